"""Run folders: every way to train writes the same one, it is read back as it was, and others are refused."""

import dataclasses
import json
import os
import re
import shutil
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from ibaml import Batch, Episode, MetaLearner, records
from ibaml.cli import main
from ibaml.learner.evaluations import read_evaluation, write_evaluation
from ibaml.learner.folder import MODEL, SETTINGS
from ibaml.learner.run_folder import write_summary
from ibaml.networks import MLP, Conv4
from ibaml.posterior import FittedModel
from ibaml.recipes import get_recipe, load_learner, runs
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.evaluate import evaluate
from ibaml.train.log import METRICS
from ibaml.train.processes import launch

CHANGES = {
    "trainer.num_steps": 2,
    "trainer.tasks_per_step": 2,
    "trainer.num_validation_tasks": 2,
    "data.num_test_queries": 4,
    "network.arguments.hidden_sizes": (4,),
}
FLAGS = (
    "--steps 2 --trainer.tasks-per-step 2 --trainer.num-validation-tasks 2 --data.num-test-queries 4 "
    "--network.arguments.hidden-sizes 4 --device cpu"
).split()
NAME = "sinusoid_5shot_ibaml"
RECIPE = get_recipe(NAME).replace(CHANGES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder after training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.train_run(RECIPE, folder)
    return folder


def tensors_of(folder, name=MODEL):
    return load_tensors(folder / name)[0]


def assert_same_tensors(first, second, name=MODEL):
    one, other = tensors_of(first, name), tensors_of(second, name)
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# Training


SCRIPT = """
import sys
from pathlib import Path
import torch
from ibaml.train.processes import connect
from ibaml.recipes import Recipe

torch.set_num_threads({num_threads})
recipe = Recipe.from_json(Path(sys.argv[1]).read_text())
with connect() as processes:
    tasks = [recipe.data.sampler(split) for split in ("train", "validation")]
    recipe.learner().fit(*tasks, settings=recipe.trainer, run_folder=sys.argv[2], processes=processes)
"""


def test_every_way_to_train_gives_the_same_bits(trained, tmp_path, monkeypatch):
    """``train_run`` (an experiment's way) against MetaLearner, the command line, a script and one under torchrun."""
    tasks = [RECIPE.data.sampler(split) for split in ("train", "validation")]
    learner = RECIPE.learner().fit(*tasks, settings=RECIPE.trainer)
    learner.save(tmp_path / "fit")
    RECIPE.learner().fit(*tasks, settings=RECIPE.trainer, run_folder=tmp_path / "run_folder")
    with pytest.raises(SystemExit) as caught:
        main(["train", NAME, "--run-folder", str(tmp_path / "cli"), *FLAGS])
    assert caught.value.code == 0
    script, recipe = tmp_path / "script.py", tmp_path / "recipe.json"
    script.write_text(SCRIPT.format(num_threads=torch.get_num_threads()))
    recipe.write_text(RECIPE.to_json())
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    assert launch([str(script), str(recipe), str(tmp_path / "torchrun")], 1) == 0
    for way in ("fit", "run_folder", "cli", "torchrun"):
        assert_same_tensors(trained, tmp_path / way)
    for way in ("run_folder", "cli", "torchrun"):
        assert_same_tensors(trained, tmp_path / way, CHECKPOINT)
        assert (tmp_path / way / SETTINGS).read_bytes() == (trained / SETTINGS).read_bytes()


def test_what_a_run_leaves(trained):
    names = {path.name for path in trained.iterdir()} - {"evaluation"}
    assert names == {
        *(MODEL, SETTINGS, CHECKPOINT, METRICS),
        *("recipe.json", "environment.json", "README.md", "tensorboard", "training.png"),
        "previous.checkpoint.safetensors",
    }
    assert runs.read_recipe(trained) == RECIPE
    environment = json.loads((trained / "environment.json").read_text())
    assert environment.keys() == {
        "date",
        "command",
        "python",
        "packages",
        "platform",
        "threads",
        "cuda",
        "processes",
        "data",
    }
    assert environment["threads"] == torch.get_num_threads() and environment["processes"] == 1


def test_the_readme_names_what_is_there(trained):
    write_summary(trained)
    text = (trained / "README.md").read_text()
    assert text.startswith(f"# {NAME}\n\nibaml on the whole network; sinusoid regression, 5-shot.\n")
    assert "- 2 of 2 meta-steps of 2 tasks." in text
    assert re.search(r"- Chosen state: step \d, lowest validation nll\.", text)
    assert "- ibaml: implicit gradient" in text and "- Network: MLP, normalisation policy: none." in text
    named = set(re.findall(r"^\| ([\w./]+) \| ", text, re.MULTILINE))
    assert named - {"file"} == {path.name for path in trained.iterdir()} - {"README.md"}


def test_the_readme_of_a_saved_learner(trained, tmp_path):
    MetaLearner.load(trained).save(tmp_path)
    write_summary(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# A trained MetaLearner\n") and "training.png" not in text and "ibaml evaluate" not in text


def test_a_run_says_where_it_goes_and_goes_on_where_it_stopped(trained, tmp_path, capsys):
    console = Console(file=StringIO(), width=200)
    first = runs.train_run(RECIPE, tmp_path, max_minutes=1e-9, console=console)
    assert (first.num_steps, first.stop_reason) == (1, "time limit")
    assert f"Training {NAME} on cpu: 2 meta-steps of 2 tasks. Everything goes to" in console.file.getvalue()
    assert runs.train_run(RECIPE, tmp_path).num_steps == 2
    assert capsys.readouterr() == ("", ""), "silent without a console"
    assert_same_tensors(trained, tmp_path, CHECKPOINT)


def test_a_run_in_progress_is_a_model(tmp_path):
    runs.train_run(RECIPE, tmp_path, max_minutes=1e-9)
    learner = MetaLearner.load(tmp_path)
    assert learner.fitted_model.step == 1
    assert learner.evaluate(RECIPE.data.sampler("test"), num_tasks=2)["mse"].mean > 0


def test_training_refuses_before_it_writes(tmp_path):
    recipe = get_recipe("omniglot_5way_1shot_maml")
    with pytest.raises(FileNotFoundError, match=re.escape(f"looked in {tmp_path / 'data'}")):
        runs.train_run(recipe, tmp_path / "run", data=tmp_path / "data")
    assert not (tmp_path / "run").exists()


# Which run a folder holds


def test_opening_again(tmp_path):
    runs.open_run(tmp_path, RECIPE)
    runs.open_run(tmp_path, RECIPE)
    with pytest.raises(ValueError, match=f"holds a run of '{NAME}', not of 'sinusoid_5shot_maml': choose"):
        runs.open_run(tmp_path, get_recipe("sinusoid_5shot_maml"))
    assert runs.read_recipe(tmp_path) == RECIPE
    # Nothing has been trained, so that the settings are still free.
    changed = RECIPE.replace({"data.num_shots": 2})
    runs.open_run(tmp_path, changed)
    assert runs.read_recipe(tmp_path) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.num_shots": 2}, "data.num_shots was 5 and is now 2"),
        ({"algorithm.temperature": 1.0}, "algorithm.temperature was 0.025 and is now 1.0"),
        ({"trainer.seed": 3}, "trainer.seed was 0 and is now 3"),
        ({"network.arguments.hidden_sizes": (5,)}, "network.arguments.hidden_sizes was [4] and is now [5]"),
    ],
)
def test_a_trained_run_keeps_its_settings(trained, changes, message):
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=re.escape(f"{trained} was trained with other settings: {message}. Use the")):
        runs.train_run(RECIPE.replace(changes), trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_what_may_change_in_a_trained_run(trained):
    longer = RECIPE.replace({"trainer.num_steps": 9, "trainer.fast": False, "num_test_tasks": 3})
    runs.check_run(trained, dataclasses.replace(longer, description="told otherwise"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"run folder .*file/run cannot be written \(.+\): choose another with --run-folder"
    ):
        runs.open_run(tmp_path / "file" / "run", RECIPE)


def test_a_folder_that_is_no_run(tmp_path):
    message = f"{tmp_path} is no run of a recipe: it has no recipe.json. `ibaml train` makes one."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        runs.read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="this is no recipe of this version of ibaml"):
        runs.read_recipe(tmp_path)


# Evaluating


def test_every_way_to_evaluate_gives_the_same_numbers(trained):
    done = []
    found = runs.evaluate_run(trained, num_tasks=3, seed=4, on_progress=lambda *parts: done.append(parts))
    assert done[-1] == (3, 3)
    learner = MetaLearner.load(trained)
    report = learner.evaluate(RECIPE.data.sampler("test"), num_tasks=3, seed=4)
    fitted = learner.fitted_model
    direct = evaluate(fitted, RECIPE.data.sampler("test"), num_tasks=3, seed=4)
    assert dict(found.evaluation.report) == dict(report) == dict(direct.report)
    stored = read_evaluation(trained)
    assert stored.report == dict(report) and stored.step == found.step == fitted.step
    assert stored.tasks == {"data": records.to_json(RECIPE.data), "seed": 4, "num_tasks": 3}
    assert stored.algorithm == records.to_json(RECIPE.algorithm)
    for name, value in direct.per_task.items():
        assert torch.equal(stored.per_task[name], value)
    used = f"3 tasks with 5 known and {RECIPE.data.num_test_queries} predicted examples"
    assert found.headline == f"{NAME}: test on {used}; seed 4, state of step {fitted.step}, temperature 0.025"
    pictures = {path.name for path in (trained / "evaluation").iterdir()}
    drawn = {"quantiles.png", "example_task.png"}
    assert pictures == {"report.json", "report.html", "per_task.csv", "predictions.safetensors", *drawn}


def test_evaluating_with_changes(trained):
    changed = RECIPE.replace({"algorithm.inner.num_steps": 1, "num_test_tasks": 2, "data.num_test_queries": 3})
    found = runs.evaluate_run(trained, recipe=changed)
    assert found.learner.algorithm.inner.num_steps == 1 and found.evaluation.mean.shape == (2, 3, 1)
    assert read_evaluation(trained).algorithm["inner"]["num_steps"] == 1
    assert runs.read_recipe(trained) == RECIPE
    with pytest.raises(ValueError, match="belongs to another network or algorithm"):
        runs.evaluate_run(
            trained, recipe=dataclasses.replace(RECIPE, algorithm=get_recipe("sinusoid_5shot_maml").algorithm)
        )


def test_evaluating_what_is_not_trained(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="has no model.safetensors: it holds no trained model"):
        runs.evaluate_run(tmp_path)
    MetaLearner.load(trained).save(tmp_path)
    with pytest.raises(ValueError, match="was not trained by a recipe, which would name its test tasks: give --test"):
        runs.evaluate_run(tmp_path)


def test_a_place_for_the_evaluation_is_asked_for_before_any_task_is_scored(tmp_path, trained, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    (folder / "evaluation").write_text("a file, where a folder is to be")
    monkeypatch.setattr(MetaLearner, "evaluate_in_full", lambda *_, **__: pytest.fail("a task was scored"))
    message = r"an evaluation goes into .*/run/evaluation, which cannot be written \(File exists\): change its permissi"
    with pytest.raises(OSError, match=message):
        runs.evaluate_run(folder)


def test_evaluating_with_known_rows_of_a_table(tmp_path, trained):
    with pytest.raises(ValueError, match="num_support splits the rows of --test; the tasks of a recipe come with"):
        runs.evaluate_run(trained, num_support=2)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"task": np.arange(60) // 10, "x": rng.normal(size=60), "y": rng.normal(size=60)})
    model = MLP(1, input_shape=1, hidden_sizes=(3,), norm="none")
    learner = MetaLearner(model, "linear_gaussian", "gaussian").fit(table, task="task", target="y", num_steps=1)
    learner.save(tmp_path / "model")
    table[:55].to_csv(tmp_path / "test.csv", index=False)
    with pytest.warns(RuntimeWarning, match="1 of 6 tasks left out: '5' has 5 different rows"):
        found = runs.evaluate_run(tmp_path / "model", test=tmp_path / "test.csv", num_support=6)
    assert found.headline.startswith("model: test on 5 tasks with 6 known and 4 predicted examples, 1 left out; seed 0")
    expected = learner.evaluate(table[:50], num_support=6)["nll"].mean
    assert found.evaluation.report["nll"].mean == pytest.approx(expected, rel=1e-5)
    assert read_evaluation(tmp_path / "model").tasks["data"]["num_support"] == 6
    stored = json.loads((tmp_path / "model" / "evaluation" / "report.json").read_text())
    assert stored["num_support"] == {"smallest": 6, "median": 6, "largest": 6} and [*stored["left_out"]] == ["5"]


# Stored evaluations


def evaluation(num_tasks: int = 3):
    learner = RECIPE.learner()
    model, algorithm = learner.model, learner.algorithm
    meta = algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(0))
    fitted = FittedModel(model=model, algorithm=algorithm, meta=meta, preprocessing=None, device=torch.device("cpu"))
    return evaluate(fitted, RECIPE.data.sampler("test"), num_tasks=num_tasks, seed=4)


def write(folder, found):
    return write_evaluation(folder, found, tasks={"data": {}, "seed": 4}, step=2, algorithm={"name": "x"})


def test_an_evaluation_is_read_back(tmp_path):
    result = evaluation()
    target = write(tmp_path, result)
    stored = read_evaluation(tmp_path)
    assert (stored.report, stored.step, stored.algorithm) == (dict(result.report), 2, {"name": "x"})
    for name, value in result.per_task.items():
        assert torch.equal(stored.per_task[name], value)
    tensors, metadata = load_tensors(target / "predictions.safetensors")
    assert tensors.keys() == {"targets", "mean", "variance"} and torch.equal(tensors["mean"], result.mean)
    assert metadata["tasks"]["seed"] == 4
    write(tmp_path, evaluation(num_tasks=1))
    assert read_evaluation(tmp_path).tasks["num_tasks"] == 1
    assert sorted(path.name for path in target.iterdir()) == ["per_task.csv", "predictions.safetensors", "report.json"]


def test_an_evaluation_that_was_cut_off(tmp_path, monkeypatch):
    """The old report beside the new tasks is no evaluation."""
    write(tmp_path, evaluation())
    real = os.replace

    def replace(old, new):
        real(old, new)
        if new.name == "per_task.csv":
            raise InterruptedError

    monkeypatch.setattr(os, "replace", replace)
    found = evaluation()
    other = dataclasses.replace(found, per_task={name: value + 1 for name, value in found.per_task.items()})
    with pytest.raises(InterruptedError):
        write(tmp_path, other)
    with pytest.raises(ValueError, match="per_task.csv is of another evaluation than report.json, or was changed"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("change", ['"num_steps": 1', '"num_test_tasks": 600'])
def test_a_changed_recipe_is_noticed(trained, tmp_path, change):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    name, _, number = change.partition(" ")
    text = path.read_text()
    path.write_text(re.sub(rf"{name} \d+", f"{name} 7", text))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=r"recipe.json cannot be read \(it was changed since training wrote it"):
        runs.evaluate_run(tmp_path / "run", num_tasks=1)


def test_a_model_of_another_run_is_noticed(trained, tmp_path):
    """With a recipe that was written as a whole."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "recipe.json").unlink()
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    runs.open_run(tmp_path / "run", RECIPE.replace({"algorithm.inner.num_steps": 7}))
    with pytest.raises(ValueError, match="did not train: by the recipe, algorithm.inner.num_steps was 7 and is now"):
        runs.evaluate_run(tmp_path / "run", num_tasks=1)


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"name": 1}'])
def test_a_damaged_recipe_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe.json cannot be read \(.*: restore it from a copy, or train in"):
        runs.read_recipe(tmp_path)


def test_no_evaluation(tmp_path):
    message = f"{tmp_path} has not been evaluated: run `ibaml evaluate {tmp_path}` first."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("report.json", lambda text: text[: len(text) // 2]),
        ("report.json", lambda text: "[]"),
        ("report.json", lambda text: text.replace('"metrics"', '"numbers"')),
        ("report.json", lambda text: text.replace('"half_width"', '"width"')),
        ("per_task.csv", lambda text: ""),
        ("per_task.csv", lambda text: text.splitlines()[0] + "\n"),
        ("per_task.csv", lambda text: text[:-30]),
        ("per_task.csv", lambda text: "\n".join(text.splitlines()[:-1]) + "\n"),
        ("per_task.csv", lambda text: text.replace(".", "x")),
        ("per_task.csv", lambda text: text.replace("1", "2", 1)),
        ("report.json", lambda text: text.replace('"step": 2', '"step": 3')),
        ("report.json", lambda text: "[" * 100_000),
    ],
)
def test_a_damaged_evaluation(tmp_path, name, change):
    path = write(tmp_path, evaluation()) / name
    path.write_text(change(path.read_text()))
    message = re.escape(f"{tmp_path / 'evaluation'} is damaged (")
    with pytest.raises(ValueError, match=message + f".*run `ibaml evaluate {re.escape(str(tmp_path))}` again"):
        read_evaluation(tmp_path)


def test_tasks_of_unequal_size_are_stored_one_after_the_other(tmp_path):
    rng = np.random.default_rng(0)

    def table(*sizes):
        x = rng.normal(size=(sum(sizes), 2))
        columns = {"task": np.repeat(np.arange(len(sizes)), sizes), "a": x[:, 0], "b": x[:, 1], "y": x.sum(1)}
        return pd.DataFrame(columns)

    MetaLearner(likelihood="gaussian").fit(
        table(6, 7, 8), task="task", target="y", num_steps=1, run_folder=tmp_path / "run"
    )
    table(6, 9, 7).to_csv(tmp_path / "test.csv", index=False)
    found = runs.evaluate_run(tmp_path / "run", test=tmp_path / "test.csv")
    tensors, _ = load_tensors(found.target / "predictions.safetensors")
    assert tensors["num_queries"].tolist() == [3, 5, 4] and tensors["mean"].shape == (12, 1)
    squares = ((tensors["mean"] - tensors["targets"]) ** 2).split(tensors["num_queries"].tolist())
    stored = read_evaluation(tmp_path / "run").per_task["mse"]
    torch.testing.assert_close(torch.stack([each.mean() for each in squares]), stored, rtol=1e-9, atol=0)


def test_a_run_takes_images_as_its_source_reads_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (10, 1, 28, 28), generator=generator, dtype=torch.uint8)
    batch = Batch(x / 255, torch.arange(10) % 5)
    network = Conv4(5, channels=2, downsample="stride")
    learner = MetaLearner(network, "prototypes", classes="per_task").fit([Episode(batch, batch)], num_steps=1)
    runs.open_run(tmp_path, get_recipe("glyphs_5way_5shot"))
    learner.save(tmp_path)
    labels = np.array(list("abcde"))[batch.y.numpy()]
    prediction = load_learner(tmp_path).adapt(x.numpy(), labels).predict(x.numpy())
    expected = MetaLearner.load(tmp_path).adapt(*batch).predict(batch.x)
    np.testing.assert_allclose(prediction.probs, expected.probs.numpy(), rtol=1e-6)
    assert prediction.classes.tolist() == list("abcde")
