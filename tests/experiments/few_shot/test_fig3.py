"""The numbers of Fig. 3 against a direct computation, bin by bin."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ibaml.data import ClassImages
from ibaml.experiments.few_shot import fig3
from ibaml.experiments.few_shot.calibration import NUM_BINS, Calibration, calibration
from ibaml.experiments.few_shot.fig3 import Fig3Result, Fig3Settings
from ibaml.experiments.few_shot.run import RunResult
from ibaml.experiments.report import Place
from ibaml.experiments.training import TrainedRun
from ibaml.learner.evaluations import StoredEvaluation
from ibaml.metrics import estimate

SMALL = {
    "data.num_ways": "2",
    "data.num_queries": "1",
    "data.num_test_queries": "3",
    "data.image_size": "8",
    "network.arguments.num_outputs": "2",
    "network.arguments.image_size": "8",
    "network.arguments.channels": "2",
    "trainer.tasks_per_step": "1",
    "trainer.num_validation_tasks": "1",
    "algorithm.inner.num_steps": "2",
}


def predictions(num_tasks: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tasks, 20, 5, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(5, (num_tasks, 20), generator=generator)


def gaps(probs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """ECE and MCE of some predictions by their definition, with 15 bins."""
    confidence, prediction = probs.flatten(0, -2).max(-1)
    right = (prediction == labels.flatten()).double()
    expected, largest = 0.0, 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = (right[inside].mean() - confidence[inside].mean()).abs().item()
            expected += gap * inside.sum().item() / len(confidence)
            largest = max(largest, gap)
    return expected, largest


def result(settings: Fig3Settings) -> Fig3Result:
    """Made-up predictions of three methods, the second not evaluated."""
    _, labels = predictions()
    found: list[RunResult] = []
    calibrations: dict[str, Calibration] = {}
    for index, (method, recipe) in enumerate(settings.recipes().items()):
        probs, _ = predictions(seed=index)
        evaluation = None
        if index != 1:
            calibrations[method] = calibration(probs, labels, predictions()[0] if index else None)
            report = {name: estimate(torch.tensor([0.25, 0.75])) for name in ("accuracy", "nll")}
            evaluation = StoredEvaluation({"seed": 0, "num_tasks": 12}, report, {}, 7, None)
        found.append(
            RunResult(method, TrainedRun(recipe, Path("x"), 9 * index, 7, 2.0), ("x86_64 CPU",), evaluation, {})
        )
    return Fig3Result(settings, tuple(found), calibrations)


def test_calibration_against_the_definition():
    probs, labels = predictions()
    reference, _ = predictions(seed=1)
    found = calibration(probs, labels, reference)
    pooled = gaps(probs, labels)
    per_task = torch.tensor([gaps(p, y) for p, y in zip(probs, labels, strict=True)], dtype=torch.float64)
    other = torch.tensor([gaps(p, y) for p, y in zip(reference, labels, strict=True)], dtype=torch.float64)
    for column, name in enumerate(("ece", "mce")):
        assert found.pooled[name].mean == pytest.approx(pooled[column], abs=1e-12)
        assert found.per_task[name].mean == pytest.approx(per_task[:, column].mean().item(), abs=1e-12)
        difference = per_task[:, column] - other[:, column]
        assert found.differences[name].mean == pytest.approx(difference.mean().item(), abs=1e-12)
        # Student's t for eleven degrees of freedom.
        half_width = 2.200985160 * difference.std().item() / 12**0.5
        assert found.differences[name].half_width == pytest.approx(half_width, rel=1e-8)
        assert found.pooled[name].half_width > 0
    assert (found.curve.ece, found.curve.mce) == pytest.approx(pooled, abs=1e-12)
    assert len(found.curve.count) == NUM_BINS == 15 and found.curve.count.sum() == labels.numel()
    assert not calibration(probs, labels).differences
    assert calibration(probs, labels, probs).differences["ece"].mean == 0


def test_calibration_is_that_of_the_stored_predictions(tmp_path, monkeypatch):
    images = ClassImages(
        images=torch.randint(0, 256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        class_start=torch.arange(5) * 6,
        class_names=("a", "b", "c", "d"),
    )
    monkeypatch.setattr("ibaml.data.sources.tiny_imagenet.load_tiny_imagenet", lambda split, **_: images)
    settings = Fig3Settings(changes=SMALL, steps=1, num_tasks=4, device="cpu", only=("maml_k5",))
    found = fig3.run(settings, Place(tmp_path))
    (one,) = found.runs
    measured = found.calibrations["maml_k5"]
    # The report's bins are the same ones.
    for name in ("ece", "mce"):
        assert measured.per_task[name].mean == pytest.approx(one.evaluation.report[name].mean, abs=1e-12)
        assert measured.pooled[name] == pytest.approx(one.evaluation.report[f"{name}_pooled"], abs=1e-12)
    assert measured.curve.count.sum() == 4 * 2 * 3 and not measured.differences
    untrained = fig3.run(dataclasses.replace(settings, stage="train"), Place(tmp_path))
    assert not untrained.calibrations and len(untrained.runs) == 1


def test_the_recipes_are_those_of_the_figure():
    recipes = Fig3Settings(scale="paper").recipes()
    assert list(recipes) == ["maml_k5", "abml_k5", "ibaml_k5"]
    assert all(recipe.data.num_shots == 1 for recipe in recipes.values())
    with pytest.raises(ValueError, match="only names 'ibaml_k15'; did you mean 'ibaml_k5'"):
        Fig3Settings(only=("ibaml_k15",))


def test_rows():
    found = result(Fig3Settings())
    maml, abml, ibaml = fig3.rows(found)
    assert maml.keys() == abml.keys() == ibaml.keys()
    assert (maml["method"], maml["num_bins"], maml["num_tasks"], maml["step"]) == ("maml_k5", 15, 12, 7)
    assert (abml["num_steps"], abml["ece"], abml["accuracy"], abml["step"]) == (9, None, None, None)
    measured = found.calibrations["ibaml_k5"]
    for name in ("ece", "mce"):
        assert ibaml[name] == measured.per_task[name].mean
        assert ibaml[f"{name}_pooled_half_width"] == measured.pooled[name].half_width
        assert ibaml[f"{name}_difference"] == measured.differences[name].mean
        assert maml[f"{name}_difference"] is None
    assert ibaml["accuracy"] == 0.5


def test_reliability_rows():
    found = result(Fig3Settings())
    rows = fig3.reliability_rows(found)
    assert {row["method"] for row in rows} == {"maml_k5", "ibaml_k5"}
    mine = [row for row in rows if row["method"] == "maml_k5"]
    assert sum(row["count"] for row in mine) == 12 * 20
    # The pooled ECE comes back from the rows alone.
    ece = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in mine) / 240
    assert ece == pytest.approx(gaps(*predictions())[0], abs=1e-12)
    assert all(row["low"] < row["confidence"] <= row["high"] for row in mine)


def test_the_summary():
    found = result(Fig3Settings())
    text = fig3.summary(found)
    assert text.startswith("Fig. 3, 1-shot: **Tiny-ImageNet stand-in, laptop scale: not miniImageNet")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert {len(row) for row in table} == {10}
    _, _, maml, abml, ibaml = table
    measured = found.calibrations["ibaml_k5"]
    assert ibaml[:3] == ["iBaML, K = 5", str(measured.per_task["ece"]), str(measured.per_task["mce"])]
    assert ibaml[3:5] == [str(measured.pooled["ece"]), str(measured.pooled["mce"])]
    difference = measured.differences["mce"]
    assert ibaml[6] == f"{difference.mean:+.3f} +- {difference.half_width:.3f}"
    assert maml[5:8] == ["-", "-", "50.0 +- 317.7"]
    planned = found.runs[0].recipe.trainer.num_steps
    assert abml[1:8] == ["-"] * 7 and abml[8:] == [f"9 of {planned:,}", "-"]
    assert "ECE and MCE with 15 equal-width bins" in text
    assert "The paper, on miniImageNet: iBaML has the lowest ECE and the lowest MCE." in text
