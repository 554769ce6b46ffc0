"""Run folders: what is written, that it is read back as it was, and what is said of folders that are none."""

import dataclasses
import json
import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from ibaml import runs
from ibaml.evaluation import Evaluation, evaluate
from ibaml.recipes import Recipe, get_recipe
from ibaml.train.checkpoint import load_tensors
from ibaml.train.log import METRICS
from ibaml.train.trainer import BEST, CHECKPOINT, Trainer

CHANGES = {
    "trainer.num_steps": "2",
    "trainer.tasks_per_step": "2",
    "trainer.num_validation_tasks": "2",
    "data.num_test_queries": "4",
    "network.arguments.hidden_sizes": "[4]",
}
RECIPE = get_recipe("sinusoid_5shot_ibaml").override(CHANGES)


@pytest.fixture
def trained(tmp_path):
    """A run folder after training, with the result and the model."""
    folder = tmp_path / "run"
    runs.open_run(folder, RECIPE)
    model = RECIPE.build_model()
    tasks = RECIPE.data.sampler("train")
    result = Trainer(model, RECIPE.algorithm, RECIPE.trainer, run_folder=folder).fit(tasks, tasks)
    return folder, result, model


def evaluation(num_tasks: int = 3) -> tuple[Recipe, Evaluation]:
    model = RECIPE.build_model()
    meta = RECIPE.algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(0))
    return RECIPE, evaluate(model, RECIPE.algorithm, meta, RECIPE.data.sampler("test"), num_tasks=num_tasks, seed=4)


# Opening


def test_a_new_run(tmp_path):
    folder = tmp_path / "some" / "run"
    runs.open_run(folder, RECIPE)
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "recipe.json"]
    assert runs.read_recipe(folder) == RECIPE
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.keys() == {"date", "command", "python", "packages", "platform", "threads", "cuda", "processes"}
    assert environment["packages"].keys() >= {"ibaml", "torch", "numpy"}
    assert environment["threads"] == torch.get_num_threads()
    assert environment["processes"] == 1
    assert (environment["cuda"] is None) == (not torch.cuda.is_available())


def test_opening_again(tmp_path):
    runs.open_run(tmp_path, RECIPE)
    runs.open_run(tmp_path, RECIPE)
    with pytest.raises(ValueError, match="holds a run of 'sinusoid_5shot_ibaml', not of 'sinusoid_5shot_maml': choose"):
        runs.open_run(tmp_path, get_recipe("sinusoid_5shot_maml"))
    assert runs.read_recipe(tmp_path) == RECIPE
    # Nothing has been trained, so that the settings are still free.
    changed = RECIPE.override({"data.num_shots": "2"})
    runs.open_run(tmp_path, changed)
    assert runs.read_recipe(tmp_path) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.num_shots": "2"}, "data.num_shots was 5 and is now 2"),
        ({"algorithm.temperature": "1.0"}, "algorithm.temperature was 0.025 and is now 1.0"),
        ({"trainer.seed": "3"}, "trainer.seed was 0 and is now 3"),
        ({"network.arguments.hidden_sizes": "[5]"}, "network.arguments.hidden_sizes was [4] and is now [5]"),
    ],
)
def test_a_trained_run_keeps_its_settings(trained, changes, message):
    folder, *_ = trained
    with pytest.raises(ValueError, match=re.escape(f"{folder} was trained with other settings: {message}. Use the")):
        runs.open_run(folder, RECIPE.override(changes))
    assert runs.read_recipe(folder) == RECIPE


def test_what_may_change_in_a_trained_run(trained):
    folder, *_ = trained
    longer = RECIPE.override({"trainer.num_steps": "9", "num_test_tasks": "3"})
    runs.open_run(folder, dataclasses.replace(longer, description="told otherwise"))
    assert runs.read_recipe(folder).trainer.num_steps == 9


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"run folder .*file/run cannot be written \(.+\): choose another with --run-folder"
    ):
        runs.open_run(tmp_path / "file" / "run", RECIPE)


def test_a_folder_that_is_no_run(tmp_path):
    message = f"{tmp_path} is no run folder: it has no recipe.json. `ibaml train` makes one."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        runs.read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="this is no recipe of this version of ibaml"):
        runs.read_recipe(tmp_path)


def test_a_run_can_be_checked_without_touching_it(trained, tmp_path):
    folder, *_ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    runs.check_run(folder, RECIPE)
    runs.check_run(tmp_path / "none", RECIPE)
    with pytest.raises(ValueError, match="trained with other settings: trainer.seed was 0 and is now 3"):
        runs.check_run(folder, RECIPE.override({"trainer.seed": "3"}))
    with pytest.raises(ValueError, match="holds a run of 'sinusoid_5shot_ibaml', not of 'sinusoid_5shot_maml'"):
        runs.check_run(folder, get_recipe("sinusoid_5shot_maml"))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (tmp_path / "none").exists()


def test_a_text_is_replaced_whole(tmp_path):
    runs.write_text(tmp_path / "text", "a long text")
    runs.write_text(tmp_path / "text", "short")
    assert (tmp_path / "text").read_text() == "short"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# Training and evaluating


def test_training_a_run_is_what_the_trainer_does(trained, tmp_path):
    folder, result, _ = trained
    console = Console(file=StringIO(), width=200)
    again = runs.train_run(RECIPE, tmp_path / "again", console=console)
    assert (again.num_steps, again.best_step, again.stop_reason) == (2, result.best_step, "completed")
    for name in (CHECKPOINT, BEST):
        whole, other = (load_tensors(path / name)[0] for path in (folder, tmp_path / "again"))
        assert whole.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in whole.items())
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"recipe.json", "environment.json", "README.md", METRICS, "tensorboard", CHECKPOINT, BEST}
    assert (
        "Training sinusoid_5shot_ibaml on cpu: 2 meta-steps of 2 tasks. Everything goes to" in console.file.getvalue()
    )


def test_a_run_goes_on_where_it_stopped(trained, tmp_path, capsys):
    first = runs.train_run(RECIPE, tmp_path, max_minutes=1e-9)
    assert (first.num_steps, first.stop_reason) == (1, "time limit")
    assert runs.train_run(RECIPE, tmp_path).num_steps == 2
    assert capsys.readouterr() == ("", ""), "silent without a console"
    whole, parts = (load_tensors(path / CHECKPOINT)[0] for path in (trained[0], tmp_path))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_training_refuses_before_it_writes(tmp_path):
    recipe = get_recipe("omniglot_5way_1shot_maml")
    with pytest.raises(FileNotFoundError, match=re.escape(f"looked in {tmp_path / 'data'}")):
        runs.train_run(recipe, tmp_path / "run", data=tmp_path / "data")
    assert not (tmp_path / "run").exists()


def test_evaluating_a_run(trained):
    folder, result, model = trained
    done: list[int] = []
    recipe, found, step, target, sampler = runs.evaluate_run(folder, num_tasks=3, seed=4, on_progress=done.append)
    assert (recipe, step, target) == (RECIPE, result.best_step, folder / "evaluation")
    expected = evaluate(model, RECIPE.algorithm, result.meta, sampler, num_tasks=3, seed=4)
    for name, value in expected.per_task.items():
        assert torch.equal(found.per_task[name], value)
    assert done[-1] == 3
    stored = runs.read_evaluation(folder)
    assert (stored.step, stored.tasks["seed"], stored.tasks["num_tasks"]) == (step, 4, 3)
    assert stored.algorithm == json.loads(RECIPE.to_json())["algorithm"]


def test_evaluating_with_changes(trained):
    folder, *_ = trained
    changes = {"algorithm.inner.num_steps": "1", "num_test_tasks": "2", "data.num_test_queries": "3"}
    found = runs.evaluate_run(folder, changes=changes)
    assert found.recipe.algorithm.inner.num_steps == 1 and found.evaluation.mean.shape == (2, 3, 1)
    assert runs.read_evaluation(folder).algorithm["inner"]["num_steps"] == 1
    assert runs.read_recipe(folder) == RECIPE


def test_evaluating_what_is_not_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no recipe.json"):
        runs.evaluate_run(tmp_path)
    runs.open_run(tmp_path, RECIPE)
    with pytest.raises(FileNotFoundError, match="has no best.safetensors: train it first"):
        runs.evaluate_run(tmp_path)


# The chosen state


def test_the_chosen_state_is_read_back(trained):
    folder, result, model = trained
    meta, step = runs.load_best(folder, RECIPE, model)
    assert step == result.best_step
    for name, value in result.meta.prior.mean.items():
        assert torch.equal(meta.prior.mean[name], value)
        assert torch.equal(meta.prior.log_var[name], result.meta.prior.log_var[name])
    assert meta.shared.keys() == {"likelihood.log_noise_variance"}


def test_a_chosen_state_that_is_not_there(tmp_path):
    message = f"{tmp_path} has no best.safetensors: train it first (`ibaml train sinusoid_5shot_ibaml`)."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        runs.load_best(tmp_path, RECIPE, RECIPE.build_model())


def test_a_chosen_state_of_another_network(trained):
    folder, *_ = trained
    other = RECIPE.override({"network.arguments.hidden_sizes": "[7]"})
    with pytest.raises(ValueError, match="best.safetensors belongs to another network or algorithm"):
        runs.load_best(folder, other, other.build_model())
    maml = get_recipe("sinusoid_5shot_maml").override(CHANGES)
    with pytest.raises(ValueError, match="best.safetensors belongs to another network or algorithm"):
        runs.load_best(folder, maml, maml.build_model())


def test_a_damaged_chosen_state(trained):
    folder, _, model = trained
    content = (folder / BEST).read_bytes()
    (folder / BEST).write_bytes(content[:50])
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        runs.load_best(folder, RECIPE, model)


# The summary


def test_the_summary_says_what_it_is(trained):
    folder, result, _ = trained
    runs.write_summary(folder, RECIPE, result)
    text = (folder / "README.md").read_text()
    assert text.startswith("# sinusoid_5shot_ibaml\n")
    assert "- 2 of 2 meta-steps of 2 tasks; ended: completed." in text
    assert f"- Chosen checkpoint: step {result.best_step}, by validation nll." in text
    assert "- ibaml: implicit gradient, 20 inner steps, temperature 0.025." in text
    assert "- MLP, normalisation policy: none." in text
    assert f"Evaluate: `ibaml evaluate {folder}`." in text
    for name in ("recipe.json", "environment.json", CHECKPOINT, BEST):
        assert f"| {name} |" in text and (folder / name).is_file()


def test_the_summary_of_weights_and_convolutions(trained, tmp_path):
    _, result, _ = trained
    runs.write_summary(tmp_path, get_recipe("omniglot_5way_1shot_maml"), result)
    text = (tmp_path / "README.md").read_text()
    assert "- maml: unrolled gradient, 3 inner steps.\n" in text
    assert "- Conv4, normalisation policy: batch." in text


# Evaluations


def test_an_evaluation_is_read_back(tmp_path):
    recipe, result = evaluation()
    target = runs.write_evaluation(tmp_path, result, recipe, seed=4, step=2)
    assert target == tmp_path / "evaluation"
    stored = runs.read_evaluation(tmp_path)
    assert stored.report == dict(result.report)
    assert stored.per_task.keys() == result.per_task.keys()
    for name, value in result.per_task.items():
        assert torch.equal(stored.per_task[name], value)
    assert stored.tasks == {"data": json.loads(recipe.to_json())["data"], "seed": 4, "num_tasks": 3}
    tensors, metadata = load_tensors(target / "predictions.safetensors")
    assert tensors.keys() == {"targets", "mean", "variance"} and torch.equal(tensors["mean"], result.mean)
    assert metadata == {"recipe": recipe.name, "seed": 4}
    report = json.loads((target / "report.json").read_text())
    assert (report["step"], report["temperature"]) == (2, 0.025)
    assert (stored.step, stored.algorithm["temperature"]) == (2, 0.025)
    # As earlier versions wrote it.
    del report["algorithm"]
    (target / "report.json").write_text(json.dumps(report))
    assert runs.read_evaluation(tmp_path).algorithm is None
    assert sorted(path.name for path in target.iterdir()) == ["per_task.csv", "predictions.safetensors", "report.json"]


def test_an_evaluation_of_a_single_task(tmp_path):
    recipe, result = evaluation(num_tasks=1)
    runs.write_evaluation(tmp_path, result, recipe, seed=0, step=0)
    stored = runs.read_evaluation(tmp_path)
    assert stored.report["mse"].mean == result.report["mse"].mean and stored.report["mse"].half_width != 0


def test_an_evaluation_replaces_the_one_before(tmp_path):
    recipe, result = evaluation()
    runs.write_evaluation(tmp_path, result, recipe, seed=4, step=2)
    _, other = evaluation(num_tasks=5)
    runs.write_evaluation(tmp_path, other, recipe, seed=4, step=2)
    assert runs.read_evaluation(tmp_path).tasks["num_tasks"] == 5


def test_weights_algorithms_have_no_temperature(tmp_path):
    _, result = evaluation()
    runs.write_evaluation(tmp_path, result, get_recipe("sinusoid_5shot_maml"), seed=0, step=0)
    assert json.loads((tmp_path / "evaluation" / "report.json").read_text())["temperature"] is None


def test_no_evaluation(tmp_path):
    message = f"{tmp_path} has not been evaluated: run `ibaml evaluate {tmp_path}` first."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        runs.read_evaluation(tmp_path)
    recipe, result = evaluation()
    runs.write_evaluation(tmp_path, result, recipe, seed=0, step=0)
    (tmp_path / "evaluation" / "per_task.csv").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        runs.read_evaluation(tmp_path)


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
    ],
)
def test_a_damaged_evaluation(tmp_path, name, change):
    recipe, result = evaluation()
    path = runs.write_evaluation(tmp_path, result, recipe, seed=0, step=0) / name
    path.write_text(change(path.read_text()))
    message = (
        rf"{re.escape(str(tmp_path))}/evaluation is damaged \(.+\): run `ibaml evaluate {re.escape(str(tmp_path))}`"
    )
    with pytest.raises(ValueError, match=message):
        runs.read_evaluation(tmp_path)
