"""How far an implicit hypergradient is from that of the inner problem solved.

The implicit function theorem holds at a solution. Where the inner steps end before it, the hypergradient has a bias
that no number of meta-steps averages out: prior variances that are far too large, for example.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.gradient_based import GradientBased
from ibaml.algorithms.nll import Nll
from ibaml.posterior import FittedModel
from ibaml.train.evaluate import draw_task
from ibaml.types import Episode, TaskSampler, Tensor

LEAST_STEPS = 100
"""Meta-steps of a training beside which the comparison costs little."""

_NUM_TASKS = 4
_TIMES_AS_MANY = 10
_SMALL = 0.5


def warn_of_bias(fitted: FittedModel, tasks: TaskSampler, *, seed: int) -> None:
    """Warns if ``bias_of`` finds a large bias on a few tasks.

    Args:
        fitted: The state of a training.
        tasks: Sampler of validation tasks.
        seed: Names the tasks.

    Warns:
        RuntimeWarning: What the bias is, and what to do.
    """
    drawn = [draw_task(tasks, index, seed=seed) for index in range(_NUM_TASKS)]
    drawn = [tree.map(lambda leaf: leaf.to(fitted.device), task) for task in drawn]
    generator = torch.Generator().manual_seed(seed)
    if found := bias_of(fitted.model, fitted.algorithm, fitted.meta, drawn, generator=generator):
        warnings.warn(found, RuntimeWarning, stacklevel=2)


def bias_of(
    nll: Nll, algorithm: Algorithm, meta: MetaParameters, tasks: Sequence[Episode], *, generator: torch.Generator
) -> str | None:
    """Compares the mean hypergradient of some tasks with that of ten times as many inner and linear steps.

    Args:
        nll: Nll of the examples of a task.
        algorithm: What adapts, at its own settings.
        meta: Where the hypergradient is taken.
        tasks: The tasks, each without a task axis.
        generator: Source of the tasks' noise.

    Returns:
        What to tell the user if the two differ by more than half of the latter, in the means or in the widths of the
        prior. None if not, or if the algorithm is not implicit or solves its problem exactly, or if so many steps do
        not come nearer to a solution, so that there is nothing to compare with.

    Cost:
        ``11 * len(tasks)`` hypergradients.
    """
    if not isinstance(algorithm, GradientBased) or algorithm.estimator != "implicit":
        return None
    solving = _with_more_steps(algorithm)
    found: list[tuple[Any, Any, Tensor, Tensor]] = []
    device = tree.leaves(meta)[0].device
    for task in tasks:
        noise = tree.map(lambda leaf: leaf.to(device), algorithm.draw_noise(meta, generator=generator))
        own, info = algorithm.hypergradient(nll, meta, task, noise)
        solved, reference = solving.hypergradient(nll, meta, task, noise)
        found.append((own.prior, solved.prior, info.inner_grad_norm, reference.inner_grad_norm))
    own, solved, before, after = (_mean(part) for part in zip(*found, strict=True))
    if not float(after) < 0.5 * float(before):
        return None
    errors = {
        name: _relative_error(one, other)
        for name, one, other in zip(
            ("means", "widths"), algorithm.parameter_groups(own), algorithm.parameter_groups(solved), strict=True
        )
    }
    name, error = max(errors.items(), key=lambda item: item[1])
    if not error > _SMALL:
        return None
    return (
        f"the inner problem is not solved in {algorithm.inner.num_steps} steps, and the implicit gradient of "
        f"{algorithm.name} there differs by {error:.0%} of its size from that of the solved problem, in the {name} of "
        f"the prior (mean of {len(tasks)} validation tasks): what is learned is biased, and variances may come out far "
        "too large. Take more inner steps (the setting inner of the algorithm), or a head, which is solved exactly "
        "(algorithm='head')."
    )


def _with_more_steps(algorithm: Any) -> Any:
    inner = dataclasses.replace(algorithm.inner, num_steps=_TIMES_AS_MANY * algorithm.inner.num_steps)
    linear = algorithm.linear
    if hasattr(linear, "max_steps"):
        linear = dataclasses.replace(linear, max_steps=_TIMES_AS_MANY * linear.max_steps)
    return dataclasses.replace(algorithm, inner=inner, linear=linear)


def _mean(of_tasks: Sequence[Any]) -> Any:
    return tree.map(lambda *leaves: torch.stack(leaves).mean(0), *of_tasks)


def _relative_error(own: Sequence[Tensor], solved: Sequence[Tensor]) -> float:
    """Returns the distance relative to the reference; 0 where there is nothing to compare."""
    size = float(tree.norm(list(solved)))
    error = float(tree.norm(tree.sub(list(own), list(solved))))
    return error / size if size > 0 and math.isfinite(error) else 0.0
