"""How many known rows a task needs: held-out rows are judged for each number of known ones."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ibaml import metrics
from ibaml.data.prepare import SplitSettings
from ibaml.learner.known_rows import nested, numbers_of_rows, split_rows
from ibaml.metrics import Estimate, LearningCurve
from ibaml.posterior import FittedModel
from ibaml.train.evaluate import Evaluation, evaluate

if TYPE_CHECKING:
    from rich.console import Console

_OF_CLASSES = ("nll", "accuracy", "ece_pooled")
_OF_NUMBERS = ("nll", "rmse", "coverage_90")


def learning_curve(
    fitted: FittedModel,
    tasks: Any,
    splits: SplitSettings,
    num_support: Iterable[int],
    *,
    seed: int,
    console: "Console | None" = None,
) -> LearningCurve:
    """Scores the same held-out rows for each number of known rows; see ``MetaLearner.learning_curve``.

    Args:
        fitted: The fitted model.
        tasks: Data.
        splits: How tasks are split, but for the number of support examples.
        num_support: Numbers of known rows.
        seed: Seed of the splits.
        console: Where progress is shown, if anywhere.
    """
    if not isinstance(num_support, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"num_support is {num_support!r}; expected numbers of rows such as [0, 1, 2, 5, 10].")
    numbers = numbers_of_rows(num_support)
    if numbers[0] == 0:
        fitted.require_prior()
    episodes, left_out = split_rows(fitted, tasks, splits, numbers, seed=seed)
    # Nested: the first rows of one support set, beside one query set.
    found = [_scores(evaluate(fitted, nested(episodes, number), seed=seed, console=console)) for number in numbers]
    return LearningCurve(
        num_support=numbers,
        scores={name: tuple(each[name] for each in found) for name in found[0]},
        num_tasks=len(episodes),
        num_left_out=len(left_out),
    )


def _scores(evaluation: Evaluation) -> dict[str, Estimate]:
    report = dict(evaluation.report)
    if "mse" in evaluation.per_task:
        report["rmse"] = metrics.estimate(evaluation.per_task["mse"].sqrt())
    names = _OF_CLASSES if "accuracy" in report else _OF_NUMBERS
    return {name: report[name] for name in names}
