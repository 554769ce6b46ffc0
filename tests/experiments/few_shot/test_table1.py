"""What Table 1's rows and its summary say."""

import re
from pathlib import Path

import pytest
import torch

from ibaml import metrics
from ibaml.experiments.few_shot import table1
from ibaml.experiments.few_shot.run import RunResult
from ibaml.experiments.few_shot.table1 import PAPER, Table1Result, Table1Settings
from ibaml.experiments.training import TrainedRun
from ibaml.learner.evaluations import StoredEvaluation
from ibaml.metrics import Estimate, paired_difference


def result(settings: Table1Settings, num_tasks: int = 30) -> Table1Result:
    """Made-up values of every method; the second has finished half of its training, the last was not evaluated."""
    generator = torch.Generator().manual_seed(0)
    found: list[RunResult] = []
    base: dict[str, torch.Tensor] = {}
    for index, (method, recipe) in enumerate(settings.recipes().items()):
        nll = 1 + 0.3 * torch.randn(num_tasks, generator=generator, dtype=torch.float64)
        per_task = {"nll": nll, "accuracy": 0.5 + 0.1 * torch.rand(num_tasks, generator=generator, dtype=torch.float64)}
        base = base or per_task
        planned = recipe.trainer.num_steps
        tasks = {"data": {}, "seed": settings.seed, "num_tasks": num_tasks}
        report = {name: metrics.estimate(values) for name, values in per_task.items()}
        last = index == len(settings.methods) - 1
        found.append(
            RunResult(
                method=method,
                trained=TrainedRun(
                    recipe,
                    Path("runs") / recipe.name,
                    num_steps=planned // 2 if index == 1 else planned,
                    best_step=40 * index,
                    seconds=1234.56 * (index + 1),
                ),
                devices=("x86_64 CPU, 1 thread",) if index else ("x86_64 CPU, 1 thread", "NVIDIA X"),
                evaluation=None if last else StoredEvaluation(tasks, report, per_task, 40 * index, None),
                differences={}
                if last or not index
                else {name: paired_difference(value, base[name]) for name, value in per_task.items()},
            )
        )
    return Table1Result(settings, tuple(found))


def test_the_recipes_are_those_of_the_table():
    recipes = Table1Settings().recipes()
    assert list(recipes) == list(PAPER)
    assert all(recipe.data.num_shots == 5 for recipe in recipes.values())
    paper = Table1Settings(scale="paper", source="mini_imagenet").recipes()
    assert {recipe.trainer.num_steps for recipe in paper.values()} == {40_000}
    assert list(Table1Settings(only=("ibaml_k10", "maml_k5")).recipes()) == ["maml_k5", "ibaml_k10"]


def test_rows():
    found = result(Table1Settings(seed=3))
    rows = table1.rows(found)
    assert len({tuple(row) for row in rows}) == 1, "a row for each method with the same columns"
    for row, one in zip(rows, found.runs, strict=True):
        assert (row["method"], row["recipe"]) == (one.method, one.recipe.name)
        assert (row["num_steps"], row["num_steps_planned"]) == (one.trained.num_steps, one.recipe.trainer.num_steps)
        assert row["paper_mini_imagenet_nll"] == PAPER[one.method].nll.mean
        assert row["paper_mini_imagenet_accuracy_half_width"] == PAPER[one.method].accuracy.half_width
    first, second, *_, last = rows
    assert (first["devices"], first["seconds"], first["seed"]) == ("x86_64 CPU, 1 thread; NVIDIA X", 1234.6, 3)
    assert first["nll_difference"] is None and first["nll"] == found.runs[0].evaluation.report["nll"].mean
    assert second["accuracy_difference"] == found.runs[1].differences["accuracy"].mean
    assert second["accuracy_difference_half_width"] == found.runs[1].differences["accuracy"].half_width
    assert all(last[name] is None for name in ("step", "num_tasks", "seed", "nll", "accuracy_half_width"))


def test_the_numbers_of_the_paper():
    """As printed: nll, accuracy in per cent, and their intervals."""
    printed = {
        "maml_k5": ("0.967 +- 0.017", "63.1% +- 0.9%"),
        "abml_k5": ("0.957 +- 0.016", "62.8% +- 0.7%"),
        "ibaml_k5": ("0.965 +- 0.018", "63.2% +- 0.7%"),
        "ibaml_k10": ("0.947 +- 0.017", "64.0% +- 0.8%"),
        "ibaml_k15": ("0.943 +- 0.017", "64.0% +- 0.7%"),
    }
    assert {name: (str(row.nll), f"{row.accuracy:.1%}") for name, row in PAPER.items()} == printed


def cells(text: str, method: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_summary():
    found = result(Table1Settings())
    text = table1.summary(found)
    assert text.startswith("Table 1, 5-shot: **Tiny-ImageNet stand-in, laptop scale: not miniImageNet, nor the paper's")
    heads = cells(text, "method")
    assert heads[-2:] == ["paper, miniImageNet: nll", "paper, miniImageNet: accuracy (%)"]
    maml, abml, ibaml = (cells(text, name) for name in ("MAML, K = 5", "ABML, K = 5", "iBaML, K = 15"))
    assert {len(maml), len(abml), len(ibaml)} == {len(heads)}
    evaluation = found.runs[0].evaluation
    assert maml[1] == str(evaluation.report["nll"]) and maml[3:5] == ["-", "-"]
    accuracy = evaluation.report["accuracy"]
    assert maml[2] == f"{100 * accuracy.mean:.1f} +- {100 * accuracy.half_width:.1f}"
    difference = found.runs[1].differences["nll"]
    assert abml[3] == f"{difference.mean:+.3f} +- {difference.half_width:.3f}"
    assert re.fullmatch(r"[+-]\d+\.\d \+- \d+\.\d", abml[4])
    planned = found.runs[0].recipe.trainer.num_steps
    assert abml[5:8] == [f"{planned // 2:,} of {planned:,}", "40", "2,469"]
    assert ibaml[1:5] == ["-"] * 4 and ibaml[6] == "-"
    assert ibaml[-2:] == ["0.943 +- 0.017", "64.0 +- 0.7"]
    assert f"**Training is not finished**: ABML, K = 5 at {planned // 2:,} of {planned:,} meta-steps." in text
    assert "only the order of the methods can be compared" in text


@pytest.mark.parametrize(
    ("source", "scale", "comparable"),
    [("mini_imagenet", "paper", True), ("mini_imagenet", "laptop", False), ("tiny_imagenet", "paper", False)],
)
def test_the_summary_says_what_can_be_compared(source, scale, comparable):
    text = table1.summary(result(Table1Settings(source=source, scale=scale)))
    assert ("only the order of the methods can be compared" not in text) == comparable


def test_a_negative_difference():
    found = result(Table1Settings())
    below = found.runs[1]._replace(differences={"nll": Estimate(-0.25, 0.5, 9), "accuracy": Estimate(-0.125, 0.02, 9)})
    text = table1.summary(found._replace(runs=(found.runs[0], below)))
    assert cells(text, "ABML, K = 5")[3:5] == ["-0.250 +- 0.500", "-12.5 +- 2.0"]
