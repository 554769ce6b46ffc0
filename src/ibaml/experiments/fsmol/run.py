"""Few-shot prediction of molecules' activity: FS-Mol's validation assays, or the assays of any file of its layout.

Methods that meta-learn are trained on FS-Mol's training assays, each in a run folder of its own that can be stopped and
resumed. Then every assay shows 16, 32 or 64 of its molecules, a stratified draw, and each method ranks the others. All
methods see the same draws. delta-AUPRC is the average precision minus the fraction of actives among the queries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ibaml import metrics
from ibaml.data import Assays, AssayTasks, load_assays
from ibaml.experiments.fsmol import baselines
from ibaml.experiments.report import Place, require_at_least
from ibaml.experiments.training import TrainedRun, train_or_resume
from ibaml.learner import MetaLearner
from ibaml.recipes import RECIPES, Recipe, get_recipe
from ibaml.seeds import task_generator
from ibaml.train.devices import resolve_device
from ibaml.types import Batch, Tensor

METRICS = ("delta_auprc", "nll", "ece")

Classifier = Callable[[Batch, Tensor, int], Tensor]
"""``(support, x_query, seed) -> probability of active``, ``[num_queries]``."""

BASELINES: Mapping[str, Classifier] = {
    "nearest_neighbours": lambda support, x, _: baselines.nearest_neighbours(support, x),
    "random_forest": lambda support, x, _: baselines.random_forest(support, x),
    "logistic_regression": lambda support, x, _: baselines.logistic_regression(support, x),
}
"""Methods that learn from one support set alone."""

DISPLAY_NAMES: Mapping[str, str] = {
    "fsmol": "default",
    "fsmol_prototypes": "prototypes",
    "fsmol_ibaml": "iBaML, inner steps",
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
        known = [name for name in RECIPES if name.startswith("fsmol")] + list(BASELINES)
        unknown = [name for name in self.methods if name not in known]
        if unknown or not self.methods:
            named = f"names {', '.join(unknown)}" if self.methods else "is empty"
            raise ValueError(f"methods {named}; there are {', '.join(known)}.")
        if not self.support_sizes or min(self.support_sizes) < 2:
            raise ValueError(f"support_sizes must be one or more numbers of at least 2, but is {self.support_sizes}.")
        require_at_least(self, 1, "num_draws", "max_queries", "num_steps")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, but is {self.max_minutes}.")

    def recipes(self) -> list[Recipe]:
        """Returns the recipes among the methods."""
        found = [get_recipe(name) for name in self.methods if name not in BASELINES]
        if self.num_steps is None:
            return found
        return [recipe.replace({"trainer.num_steps": self.num_steps}) for recipe in found]


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


def run(settings: FsmolSettings, place: Place) -> FsmolResult:
    """Trains each recipe, or resumes it, and then predicts the same draws with every method.

    Args:
        settings: What to do.
        place: The output folder and the data; the runs are in ``runs/NAME``. A further call with the same folder goes
            on where the last stopped.

    Raises:
        FileNotFoundError: If an assay file is not found.
        ImportError: If a baseline is asked for and scikit-learn is not installed.
        ValueError: If an assay file is damaged or has no large enough assay, or the folder holds other runs.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite.
        KeyboardInterrupt: If training was interrupted; everything is saved.
    """
    device = resolve_device(settings.device)
    assays = load_assays(settings.split, root=place.data, path=settings.file)
    classifiers: dict[str, Classifier] = {name: BASELINES[name] for name in settings.methods if name in BASELINES}
    trained: list[TrainedRun] = []
    for recipe in settings.recipes():
        one = train_or_resume(recipe, place, device=device, max_minutes=settings.max_minutes)
        trained.append(one)
        classifiers[recipe.name] = _classifier(one, device)

    names: dict[int, tuple[str, ...]] = {}
    scores: dict[int, dict[str, dict[str, Tensor]]] = {}
    seen: dict[int, Tensor] = {}
    known = np.unique(np.concatenate(load_assays("train", root=place.data).rows)) if settings.file is None else None
    for size in settings.support_sizes:
        large = [index for index in range(len(assays)) if len(assays.rows[index]) >= size + 10]
        if not large:
            raise ValueError(f"support_sizes has {size}, but no assay has the {size + 10} rows that it takes.")
        if place.console is not None:
            place.console.print(f"Predicting {len(large)} assays from {size} molecules each.", markup=False)
        chosen = assays.select(large)
        names[size] = chosen.names
        scores[size] = _score(chosen, size, {name: classifiers[name] for name in settings.methods}, settings)
        if known is not None:
            seen[size] = torch.tensor([float(np.isin(rows, known).mean()) for rows in chosen.rows])
    return FsmolResult(settings, tuple(trained), names, scores, seen if known is not None else None)


def _classifier(trained: TrainedRun, device: torch.device) -> Classifier:
    """Returns a run's chosen state as a function that adapts and predicts."""
    learner = MetaLearner.load(trained.folder, device=device)

    def classify(support: Batch, x_query: Tensor, seed: int) -> Tensor:
        prediction: Any = learner.adapt(support.x, support.y, seed=seed).predict(x_query, seed=seed)
        return prediction.probs[:, 1].cpu()

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
                draws[name].append(score(classify(support, query.x, settings.seed + draw), query.y))
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
    precision = baselines.average_precision(probability.numpy(), labels.numpy())
    return [
        precision - float(labels.double().mean()),
        float(metrics.nll(probs.log(), labels[None])),
        float(metrics.ece(probs, labels[None])),
    ]
