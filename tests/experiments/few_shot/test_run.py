"""Slices of training, evaluations that are not repeated, paired differences, and what is refused before any work."""

import csv
import dataclasses
import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ibaml.data import ClassImages
from ibaml.experiments.few_shot import run as few_shot
from ibaml.experiments.few_shot.run import FewShotSettings, run_methods, run_recipes
from ibaml.experiments.report import Place, describe_device
from ibaml.learner.evaluations import read_evaluation
from ibaml.recipes import Recipe, get_recipe, runs
from ibaml.train import TrainingResult
from ibaml.train.checkpoint import CHECKPOINT, load_tensors

CPU = torch.device("cpu")
# The smallest network and tasks that the pipeline takes.
SMALL = {
    "data.num_ways": "2",
    "data.num_shots": "1",
    "data.num_queries": "1",
    "data.num_test_queries": "2",
    "data.image_size": "8",
    "network.arguments.num_outputs": "2",
    "network.arguments.image_size": "8",
    "network.arguments.channels": "2",
    "algorithm.inner.num_steps": "1",
    "trainer.tasks_per_step": "1",
    "trainer.num_validation_tasks": "2",
    "trainer.validate_every": "2",
    "trainer.log_every": "1",
}
SETTINGS = FewShotSettings(changes=SMALL, steps=3, num_tasks=4, device="cpu", only=("maml_k5", "ibaml_k5"))
RECIPES = SETTINGS.recipes()
MAML, IBAML = (recipe.name for recipe in RECIPES.values())


def fake_images() -> ClassImages:
    generator = torch.Generator().manual_seed(0)
    return ClassImages(
        images=torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8),
        class_start=torch.arange(5) * 6,
        class_names=("a", "b", "c", "d"),
    )


@pytest.fixture(scope="module", autouse=True)
def _fake_source():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibaml.data.sources.tiny_imagenet.load_tiny_imagenet", lambda split, **_: fake_images())
        yield


@pytest.fixture
def calls(monkeypatch):
    """What is trained and what is evaluated."""
    made: list[tuple[str, str]] = []
    train, evaluate = runs.train_run, runs.evaluate_run

    def train_run(recipe: Recipe, folder: Path, **arguments: object) -> TrainingResult:
        made.append(("train", recipe.name))
        return train(recipe, folder, **arguments)

    def evaluate_run(folder: Path, **arguments: object) -> runs.EvaluatedRun:
        made.append(("evaluate", folder.name))
        return evaluate(folder, **arguments)

    monkeypatch.setattr(runs, "train_run", train_run)
    monkeypatch.setattr(runs, "evaluate_run", evaluate_run)
    return made


@pytest.fixture(scope="module")
def done(tmp_path_factory, _fake_source):
    """A finished output folder with what was found."""
    folder = tmp_path_factory.mktemp("done")
    return folder, run_methods(SETTINGS, Place(folder))


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished folder that a test may change."""
    shutil.copytree(done[0], tmp_path / "out")
    return tmp_path / "out"


# What is done, and what is not done again


def test_training_and_evaluating(done):
    folder, (maml, ibaml) = done
    assert (maml.method, ibaml.method) == ("maml_k5", "ibaml_k5")
    for result in (maml, ibaml):
        assert result.trained.folder == folder / "runs" / result.recipe.name
        assert (result.trained.num_steps, result.trained.is_finished) == (3, True)
        assert result.trained.seconds == load_tensors(result.trained.folder / CHECKPOINT)[1]["seconds"] > 0
        assert result.evaluation.step == result.trained.best_step
        assert result.evaluation.tasks["num_tasks"] == 4
        assert re.fullmatch(r".+, \d+ thread\(s\)", result.devices[0]) and len(result.devices) == 1
    assert not maml.differences
    for name, difference in ibaml.differences.items():
        gap = ibaml.evaluation.per_task[name] - maml.evaluation.per_task[name]
        assert difference.mean == pytest.approx(gap.mean().item(), abs=1e-12)
        # Student's t for three degrees of freedom.
        assert difference.half_width == pytest.approx(3.182446305 * gap.std().item() / 2, rel=1e-8)
    assert ibaml.differences.keys() == {"accuracy", "nll", "brier", "ece", "mce", "selective_area"}


def test_all_methods_see_the_same_tasks(done):
    _, results = done
    targets, probs = zip(
        *(
            (tensors["targets"], tensors["log_probs"])
            for result in results
            for tensors in [load_tensors(result.trained.folder / "evaluation" / "predictions.safetensors")[0]]
        ),
        strict=True,
    )
    assert torch.equal(*targets) and not torch.equal(*probs)
    assert results[0].evaluation.tasks == results[1].evaluation.tasks


def test_nothing_is_done_twice(copy, calls):
    console = Console(file=StringIO(), width=200)
    again = run_methods(SETTINGS, Place(copy, console=console))
    assert calls == []
    assert f"{MAML} has its 3 meta-steps." in console.file.getvalue()
    assert [result.evaluation.report["nll"] for result in again] == [
        read_evaluation(copy / "runs" / name).report["nll"] for name in (MAML, IBAML)
    ]


def test_the_record_of_slices(tmp_path):
    sliced = dataclasses.replace(SETTINGS, max_minutes=1e-9, stage="train", only=("maml_k5",))
    for _ in range(4):
        (result,) = run_methods(sliced, Place(tmp_path))
    with (tmp_path / "slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["first_step"], row["last_step"], row["stop_reason"]) for row in rows] == [
        (MAML, "0", "1", "time limit"),
        (MAML, "1", "2", "time limit"),
        (MAML, "2", "3", "completed"),
    ]
    assert all(row["torch"] == torch.__version__ for row in rows)
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(result.trained.seconds, abs=0.2)
    # A run that was carried to another machine says so.
    with (tmp_path / "slices.csv").open("a") as file:
        file.write(f"{MAML},2030-01-01,NVIDIA X,9,3,3,0,completed\n")
    assert run_methods(sliced, Place(tmp_path))[0].devices == (rows[0]["device"], "NVIDIA X")
    # One that was trained outside has no record.
    (tmp_path / "slices.csv").unlink()
    assert run_methods(sliced, Place(tmp_path))[0].devices == ("unknown",)


def test_more_steps_extend_a_finished_run(copy, calls):
    longer = dataclasses.replace(SETTINGS, steps=4, stage="train", only=("maml_k5",))
    (result,) = run_methods(longer, Place(copy))
    assert (result.trained.num_steps, calls) == (4, [("train", MAML)])


@pytest.mark.parametrize("change", ["state", "seed", "number", "algorithm", "absent"])
def test_an_evaluation_of_something_else_is_made_anew(copy, calls, change):
    settings = dataclasses.replace(SETTINGS, stage="evaluate", only=("maml_k5",))
    path = copy / "runs" / MAML / "evaluation" / "report.json"
    report = json.loads(path.read_text())
    del report["sha256"]  # As of an earlier version: what was changed since is refused.
    if change == "seed":
        settings = dataclasses.replace(settings, seed=5)
    elif change == "number":
        settings = dataclasses.replace(settings, num_tasks=3)
    elif change == "state":
        report["step"] = 1
        path.write_text(json.dumps(report))
    elif change == "algorithm":
        # As `ibaml evaluate --set algorithm.inner.num_steps=7` leaves it.
        report["algorithm"]["inner"]["num_steps"] = 7
        path.write_text(json.dumps(report))
    else:
        shutil.rmtree(path.parent)
    (result,) = run_methods(settings, Place(copy))
    assert calls == [("evaluate", MAML)]
    assert result.evaluation.tasks["num_tasks"] == settings.num_tasks
    assert result.evaluation.tasks["seed"] == settings.seed
    assert result.evaluation.algorithm["inner"]["num_steps"] == 1
    run_methods(settings, Place(copy))
    assert calls == [("evaluate", MAML)]


def test_progress_is_shown(done, copy, monkeypatch):
    monkeypatch.setattr(few_shot, "_SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=StringIO(), width=200)
    settings = dataclasses.replace(SETTINGS, steps=4, seed=1, only=("maml_k5",))
    (result,) = run_methods(settings, Place(copy, console=console))
    shown = console.file.getvalue()
    assert f"{MAML}: step 4 of 4, completed." in shown
    assert f"Evaluating {MAML}, state of step {result.evaluation.step}, on 4 test tasks." in shown
    assert "4 of 4 tasks" in shown


def test_without_the_reference_there_are_no_differences(copy):
    (result,) = run_methods(dataclasses.replace(SETTINGS, only=("ibaml_k5",)), Place(copy))
    assert result.evaluation is not None and not result.differences
    assert not run_recipes(RECIPES, Place(copy), num_tasks=4, device=CPU)[1].differences


def test_an_interruption_ends_the_call(tmp_path, monkeypatch, calls):
    train = runs.train_run
    monkeypatch.setattr(
        runs, "train_run", lambda *args, **kwargs: train(*args, **kwargs)._replace(stop_reason="interrupted")
    )
    with pytest.raises(KeyboardInterrupt):
        run_methods(SETTINGS, Place(tmp_path))
    assert calls == [("train", MAML)]
    assert "interrupted" in (tmp_path / "slices.csv").read_text()


# Refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": "huge"}, "scale must be one of paper, laptop, but is 'huge'."),
        ({"source": "imagenet"}, "source must be one of tiny_imagenet, mini_imagenet, but is 'imagenet'."),
        ({"stage": "test"}, "stage must be one of both, train, evaluate, but is 'test'."),
        ({"num_tasks": 1}, "num_tasks must be at least 2, for an interval over tasks, but is 1."),
        ({"steps": 0}, "steps must be at least 1, but is 0."),
        ({"max_minutes": 0}, "max_minutes must be positive, but is 0; to train no further use stage='evaluate'."),
        (
            {"only": ("maml_k5", "ibaml_k51")},
            "only names 'ibaml_k51'; did you mean 'ibaml_k5'? There are maml_k5, abml_k5, ibaml_k5, ibaml_k10, ",
        ),
    ],
)
def test_refused_settings(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FewShotSettings(**setting)


def test_refused_changes():
    with pytest.raises(ValueError, match="no setting 'trainer.num_step'; did you mean 'trainer.num_steps'"):
        FewShotSettings(changes={"trainer.num_step": "3"}).recipes()


def test_refused_recipes(tmp_path):
    with pytest.raises(ValueError, match="recipes is empty; expected at least one method."):
        run_recipes({}, Place(tmp_path), device=CPU)
    with pytest.raises(ValueError, match="num_tasks must be at least 2, for an interval over tasks, but is 1."):
        run_recipes(RECIPES, Place(tmp_path), num_tasks=1, device=CPU)
    other = {**RECIPES, "ibaml_k5": RECIPES["ibaml_k5"].replace({"data.num_shots": 2})}
    message = r"maml_k5 and ibaml_k5 have different data settings \(\w+\(.*\): methods can be compared on the"
    with pytest.raises(ValueError, match=message):
        run_recipes(other, Place(tmp_path), device=CPU)


def test_evaluation_before_any_training(copy):
    shutil.rmtree(copy / "runs" / IBAML)
    settings = dataclasses.replace(SETTINGS, stage="evaluate")
    message = f"ibaml_k5 cannot be evaluated before any training: there is no state in {copy / 'runs'}. Train first"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        run_methods(settings, Place(copy))
    assert run_methods(dataclasses.replace(settings, only=("maml_k5",)), Place(copy))[0].evaluation is not None


def test_other_settings_in_the_same_folder_are_refused_before_any_work(copy, calls):
    message = f"{copy / 'runs' / IBAML} was trained with other settings: algorithm.temperature was 0.01 and is now 0.5."
    changed = {**RECIPES, "ibaml_k5": RECIPES["ibaml_k5"].replace({"algorithm.temperature": 0.5})}
    with pytest.raises(ValueError, match=re.escape(message)):
        run_recipes(changed, Place(copy), num_tasks=4, device=CPU)
    assert calls == []


def test_a_damaged_evaluation_is_refused(copy):
    (copy / "runs" / MAML / "evaluation" / "per_task.csv").write_text("")
    with pytest.raises(ValueError, match=r"evaluation is damaged \("):
        run_methods(SETTINGS, Place(copy))


@pytest.mark.parametrize(
    ("source", "file"),
    [("tiny_imagenet", "tiny_imagenet_fewshot.zip"), ("mini_imagenet", r"miniImageNet \(train\)")],
)
def test_missing_data_says_where_it_was_looked_for(tmp_path, monkeypatch, source, file):
    if source == "tiny_imagenet":
        from ibaml.data import load_tiny_imagenet

        monkeypatch.setattr("ibaml.data.sources.tiny_imagenet.load_tiny_imagenet", load_tiny_imagenet)
    monkeypatch.delenv("IBAML_DATA", raising=False)
    settings = FewShotSettings(source=source, device="cpu", only=("maml_k5",))
    with pytest.raises(FileNotFoundError, match=f"({file}).*{re.escape(str(tmp_path / 'data'))}"):
        run_methods(settings, Place(tmp_path / "out", tmp_path / "data"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_cuda(monkeypatch, tmp_path, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(f"device is {name!r}, but this torch finds no CUDA device(s): use")):
        run_methods(dataclasses.replace(SETTINGS, device=name), Place(tmp_path))


def test_the_name_of_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert describe_device(torch.device("cuda:0")) == "card of cuda:0"


# What is said


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("source", ["tiny_imagenet", "mini_imagenet"])
def test_the_label_says_what_it_is_not(source, scale):
    label = FewShotSettings(source=source, scale=scale).label
    assert ("not miniImageNet" in label) == (source == "tiny_imagenet")
    assert ("laptop scale" in label) == (scale == "laptop") == ("the paper's settings" in label)
    assert "changed" not in label
    changed = FewShotSettings(source=source, scale=scale, steps=7, changes={"algorithm.temperature": "1"}).label
    assert changed == f"{label}; changed: algorithm.temperature = 1, trainer.num_steps = 7"


def test_display_names():
    names = [few_shot.display_name(recipe) for recipe in FewShotSettings().recipes().values()]
    assert names == ["MAML, K = 5", "ABML, K = 5", "iBaML, K = 5", "iBaML, K = 10", "iBaML, K = 15"]
    assert few_shot.display_name(get_recipe("glyphs_5way_5shot_imaml")) == "imaml, K = 12"


def test_notes(done):
    _, results = done
    text = "\n".join(few_shot.notes(SETTINGS, results))
    assert SETTINGS.label in text
    assert "4 test tasks, the same for every method (seed 0), 2-way 1-shot with 2 query images a class" in text
    assert "Conv4, 2 channels, 8 x 8 images, normalisation: batch statistics of the queries classified toge" in text
    assert re.search(r"Temperature 0\.01, \d weight samples in training and 10 in prediction\.", text)
    assert "Trained on: " + results[0].devices[0] + "." in text
    assert "not finished" not in text
    unfinished = results[1]._replace(trained=results[1].trained._replace(num_steps=2))
    text = "\n".join(few_shot.notes(SETTINGS, [results[0], unfinished]))
    assert "**Training is not finished**: iBaML, K = 1 at 2 of 3 meta-steps." in text
    assert "Temperature" not in "\n".join(few_shot.notes(SETTINGS, results[:1]))
