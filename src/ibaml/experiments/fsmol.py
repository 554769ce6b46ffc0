"""Few-shot prediction of molecules' activity: FS-Mol's validation assays, or the assays of any file of its layout.

Methods that meta-learn are trained on FS-Mol's training assays, each in a run folder of its own that can be stopped and
resumed. Then every assay shows 16, 32 or 64 of its molecules, a stratified draw, and each method ranks the others. All
methods see the same draws. delta-AUPRC is the average precision minus the fraction of actives among the queries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from ibaml import metrics, runs
from ibaml.data import Assays, AssayTasks, load_assays
from ibaml.evaluation import predict, task_generator
from ibaml.experiments import assay_baselines
from ibaml.metrics import Estimate, estimate, paired_difference
from ibaml.prediction import ClassPrediction
from ibaml.recipes import RECIPES, Recipe, get_recipe
from ibaml.train.checkpoint import load_tensors
from ibaml.train.trainer import CHECKPOINT
from ibaml.types import Batch, Tensor

PUBLISHED: Mapping[str, tuple[float, float]] = {
    "kNN": (0.056, 0.107),
    "random forest": (0.098, 0.168),
    "GNN multi-task": (0.117, 0.182),
    "MAML": (0.165, 0.178),
    "ProtoNet": (0.211, 0.276),
}
"""Published mean delta-AUPRC on FS-Mol's test assays, which are others than those here, at support 16 and 64."""

METRICS = ("delta_auprc", "nll", "ece")

Classifier = Callable[[Batch, Tensor, torch.Generator], Tensor]
"""``(support, x_query, generator) -> probability of active``, ``[num_queries]``."""

BASELINES: Mapping[str, Classifier] = {
    "nearest_neighbours": lambda support, x, _: assay_baselines.nearest_neighbours(support, x),
    "random_forest": lambda support, x, _: assay_baselines.random_forest(support, x),
    "logistic_regression": lambda support, x, _: assay_baselines.logistic_regression(support, x),
}
"""Methods that learn from one support set alone."""

DISPLAY_NAMES: Mapping[str, str] = {
    "fsmol_ibaml": "iBaML",
    "fsmol_abml": "ABML",
    "fsmol_maml": "MAML",
    "fsmol_maml_all_layers": "MAML, all layers",
    "random_forest": "random forest",
    "nearest_neighbours": "nearest neighbours",
    "logistic_regression": "logistic regression",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FsmolSettings:
    """Settings of the experiment.

    Attributes:
        methods: Recipes of FS-Mol and baselines; differences are to the first.
        file: Another assay file of FS-Mol's layout to predict, instead of its validation assays.
        split: Which assays of that file.
        support_sizes: Support sizes; assays with fewer than ten more rows are left out.
        num_draws: Random support sets per assay and support size.
        max_queries: Query molecules per draw, at random, at most.
        num_steps: Meta-steps of every run, instead of the recipes'.
        max_minutes: Train each run for at most so long in this call, ready to go on in the next. None: to the end.
        seed: Names the draws.
        device: ``"auto"`` (CUDA if present), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
    """

    methods: tuple[str, ...] = tuple(DISPLAY_NAMES)
    file: Path | None = None
    split: str = "valid"
    support_sizes: tuple[int, ...] = (16, 32, 64)
    num_draws: int = 10
    max_queries: int = 512
    num_steps: int | None = None
    max_minutes: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses unknown methods and values out of range."""
        known = [name for name in RECIPES if name.startswith("fsmol_")] + list(BASELINES)
        unknown = [name for name in self.methods if name not in known]
        if unknown or not self.methods:
            named = f"names {', '.join(unknown)}" if self.methods else "is empty"
            raise ValueError(f"methods {named}; there are {', '.join(known)}.")
        if not self.support_sizes or min(self.support_sizes) < 2:
            raise ValueError(f"support_sizes must be one or more numbers of at least 2, but is {self.support_sizes}.")
        for field in ("num_draws", "max_queries"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but is {self.num_steps}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, but is {self.max_minutes}.")

    def recipes(self) -> list[Recipe]:
        """Returns the recipes among the methods."""
        found = [get_recipe(name) for name in self.methods if name not in BASELINES]
        if self.num_steps is None:
            return found
        return [recipe.override({"trainer.num_steps": str(self.num_steps)}) for recipe in found]


class TrainedRun(NamedTuple):
    """What training a recipe took.

    Attributes:
        recipe: What was trained.
        num_steps: Meta-steps taken.
        best_step: Meta-step of the state that was chosen on held-out training assays.
        seconds: Time it took.
    """

    recipe: Recipe
    num_steps: int
    best_step: int
    seconds: float


class FsmolResult(NamedTuple):
    """The experiment's outcome.

    Attributes:
        settings: What was asked for.
        trained: The training runs.
        assays: Support size to names of the assays that are large enough for it.
        scores: Support size to method to metric to a value per assay, the mean over draws.
        seen: Support size to the fraction of each assay's molecules that are in FS-Mol's training assays; None for
            another file.
    """

    settings: FsmolSettings
    trained: tuple[TrainedRun, ...]
    assays: Mapping[int, tuple[str, ...]]
    scores: Mapping[int, Mapping[str, Mapping[str, Tensor]]]
    seen: Mapping[int, Tensor] | None


def run(
    settings: FsmolSettings, *, folder: Path, data: Path | None = None, console: Console | None = None
) -> FsmolResult:
    """Trains each recipe, or resumes it, and then predicts the same draws with every method.

    Args:
        settings: What to do.
        folder: Output folder; the runs are in ``runs/NAME``. A further call with the same one goes on where the last
            stopped.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        console: Where progress is shown; None is silent.

    Raises:
        FileNotFoundError: If an assay file is not found.
        ImportError: If a baseline is asked for and scikit-learn is not installed.
        ValueError: If an assay file is damaged or has no large enough assay, or the folder holds other runs.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite.
        KeyboardInterrupt: If training was interrupted; everything is saved.
    """
    device = runs.resolve_device(settings.device)
    assays = load_assays(settings.split, root=data, path=settings.file)
    classifiers: dict[str, Classifier] = {name: BASELINES[name] for name in settings.methods if name in BASELINES}
    trained: list[TrainedRun] = []
    for recipe in settings.recipes():
        where = folder / "runs" / recipe.name
        result = runs.train_run(
            recipe, where, data=data, device=device, max_minutes=settings.max_minutes, console=console
        )
        if result.stop_reason == "interrupted":
            raise KeyboardInterrupt
        seconds = float(load_tensors(where / CHECKPOINT)[1]["seconds"])
        trained.append(TrainedRun(recipe, result.num_steps, result.best_step, seconds))
        classifiers[recipe.name] = _classifier(recipe, where, device)

    names: dict[int, tuple[str, ...]] = {}
    scores: dict[int, dict[str, dict[str, Tensor]]] = {}
    seen: dict[int, Tensor] = {}
    known = np.unique(np.concatenate(load_assays("train", root=data).rows)) if settings.file is None else None
    for size in settings.support_sizes:
        large = [index for index in range(len(assays)) if len(assays.rows[index]) >= size + 10]
        if not large:
            raise ValueError(f"support_sizes has {size}, but no assay has the {size + 10} rows that it takes.")
        if console is not None:
            console.print(f"Predicting {len(large)} assays from {size} molecules each.", markup=False)
        chosen = assays.select(large)
        names[size] = chosen.names
        scores[size] = _score(chosen, size, {name: classifiers[name] for name in settings.methods}, settings)
        if known is not None:
            seen[size] = torch.tensor([float(np.isin(rows, known).mean()) for rows in chosen.rows])
    return FsmolResult(settings, tuple(trained), names, scores, seen if known is not None else None)


def _classifier(recipe: Recipe, folder: Path, device: torch.device) -> Classifier:
    """Returns a run's chosen state as a function that adapts and predicts."""
    model = recipe.build_model().to(device)
    meta, _ = runs.load_best(folder, recipe, model)

    def classify(support: Batch, x_query: Tensor, generator: torch.Generator) -> Tensor:
        noise = recipe.algorithm.draw_noise(meta, generator=generator)
        posterior = recipe.algorithm.adapt(model.nll, meta, Batch(*(part.to(device) for part in support)), noise).value
        evaluation_noise = recipe.algorithm.draw_evaluation_noise(meta, generator=generator)
        with torch.no_grad():
            found = predict(model, recipe.algorithm, meta, posterior, x_query.to(device), evaluation_noise)
        assert isinstance(found, ClassPrediction)
        return found.probs[:, 1].cpu()

    return classify


def _score(
    assays: Assays, size: int, classifiers: Mapping[str, Classifier], settings: FsmolSettings
) -> dict[str, dict[str, Tensor]]:
    tasks = AssayTasks(assays, support_sizes=(size,), num_queries=settings.max_queries, min_queries=1)
    values: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    for index in range(len(assays)):
        num_queries = min(settings.max_queries, len(assays.rows[index]) - size)
        draws: dict[str, list[list[float]]] = {name: [] for name in classifiers}
        for draw in range(settings.num_draws):
            generator = task_generator(settings.seed + draw, index)
            support, query = tasks.episode(index, size, num_queries, generator=generator)
            for name, classify in classifiers.items():
                # A generator of its own: the methods before it must not change a method's weight samples.
                found = classify(support, query.x, task_generator(settings.seed + draw, index))
                draws[name].append(score(found, query.y))
        for name, rows in draws.items():
            values[name].append(torch.tensor(rows, dtype=torch.float64).mean(0))
    return {name: dict(zip(METRICS, torch.stack(rows).unbind(-1), strict=True)) for name, rows in values.items()}


def score(probability: Tensor, labels: Tensor) -> list[float]:
    """Returns delta-AUPRC, nll and ECE of one query set.

    Args:
        probability: Probability of active, ``[num_queries]``, within (0, 1).
        labels: 1 for active.

    Examples:
        >>> [round(value, 3) for value in score(torch.tensor([0.8, 0.2]), torch.tensor([1, 0]))]
        [0.5, 0.223, 0.2]
    """
    labels = labels.cpu()
    probability = probability.double().clamp(1e-6, 1 - 1e-6)
    probs = torch.stack([1 - probability, probability], -1)[None]
    precision = assay_baselines.average_precision(probability.numpy(), labels.numpy())
    return [
        precision - float(labels.double().mean()),
        float(metrics.nll(probs.log(), labels[None])),
        float(metrics.ece(probs, labels[None])),
    ]


def rows(result: FsmolResult) -> list[dict[str, object]]:
    """Returns every mean with its 95% interval over assays and the paired difference to the first method."""
    found: list[dict[str, object]] = []
    first = result.settings.methods[0]
    for size, by_method in result.scores.items():
        for method, values in by_method.items():
            row: dict[str, object] = {"support": size, "method": method, "num_assays": len(result.assays[size])}
            for metric, value in values.items():
                mean, difference = estimate(value), paired_difference(value, by_method[first][metric])
                row |= {metric: mean.mean, f"{metric}_low": mean.low, f"{metric}_high": mean.high}
                row |= {f"{metric}_difference": difference.mean, f"{metric}_half_width": difference.half_width}
            found.append(row)
    return found


def assay_rows(result: FsmolResult) -> list[dict[str, object]]:
    """Returns the values of every assay, means over draws."""
    found: list[dict[str, object]] = []
    for size, by_method in result.scores.items():
        for index, name in enumerate(result.assays[size]):
            for method, values in by_method.items():
                row: dict[str, object] = {"support": size, "assay": name, "method": method}
                found.append(row | {metric: float(value[index]) for metric, value in values.items()})
    return found


def summary(result: FsmolResult) -> str:
    """Returns what was found, as Markdown: a table per support size, and what it took."""
    settings = result.settings
    what = (
        "FS-Mol's validation assays" if settings.file is None else f"split {settings.split!r} of {settings.file.name}"
    )
    lines = [
        f"# Activity of molecules: {what}",
        "",
        f"Means over assays of the means over {settings.num_draws} random support sets, the same for every method; +- "
        f"is a 95% interval over assays. In brackets: the paired difference to {_name(settings.methods[0])}.",
    ]
    for size, by_method in result.scores.items():
        lines += ["", f"## {size} molecules known ({len(result.assays[size])} assays)", ""]
        lines += _table(by_method, settings.methods[0])
        if result.seen is not None:
            lines += _by_novelty(by_method, result.seen[size])
    lines += ["", "## Training", "", "| | meta-steps | chosen | minutes |", "|---|---:|---:|---:|"]
    lines += [
        f"| {_name(one.recipe.name)} | {one.num_steps:,} of {one.recipe.trainer.num_steps:,} | {one.best_step:,} | "
        f"{one.seconds / 60:.1f} |"
        for one in result.trained
    ]
    return "\n".join(lines) + "\n"


def _name(method: str) -> str:
    return DISPLAY_NAMES.get(method, method)


def _table(by_method: Mapping[str, Mapping[str, Tensor]], first: str) -> list[str]:
    lines = ["| | delta-AUPRC | nll | ECE |", "|---|---:|---:|---:|"]
    for method, values in by_method.items():
        cells: list[str] = []
        for metric, value in values.items():
            cell = f"{estimate(value)}"
            if method != first:
                difference: Estimate = paired_difference(value, by_method[first][metric])
                cell += f" ({difference:+.3f})".replace("+- +", "+- ")
            cells.append(cell)
        lines.append(f"| {_name(method)} | {' | '.join(cells)} |")
    return lines


def _by_novelty(by_method: Mapping[str, Mapping[str, Tensor]], seen: Tensor) -> list[str]:
    """Splits delta-AUPRC by whether training assays hold nearly all of an assay's molecules."""
    known = seen > 0.95
    if not 1 < int(known.sum()) < len(known) - 1:
        return []
    heads = [f"molecules in training assays ({int(known.sum())} assays)", f"mostly not ({int((~known).sum())} assays)"]
    lines = [
        "",
        "delta-AUPRC of assays whose molecules other assays of the training set have, and of those with new ones:",
    ]
    lines += ["", f"| | {heads[0]} | {heads[1]} |", "|---|---:|---:|"]
    for method, values in by_method.items():
        value = values["delta_auprc"]
        lines.append(f"| {_name(method)} | {estimate(value[known])} | {estimate(value[~known])} |")
    return lines
