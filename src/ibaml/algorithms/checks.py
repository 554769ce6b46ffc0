"""Checks of what goes into an algorithm and of what comes out of it."""

import math
from typing import TYPE_CHECKING, Any

from ibaml import tree
from ibaml.likelihoods import Likelihood
from ibaml.types import Batch, InnerSolution, Tensor

if TYPE_CHECKING:
    from ibaml.algorithms.base import Algorithm


def check_labels(likelihood: Likelihood, argument: str, targets: Tensor, *, num_axes: int = 1) -> None:
    """Refuses class labels with an axis too many, which would be compared with those of all other examples.

    Args:
        likelihood: What the targets are of.
        argument: How messages call the targets.
        targets: The targets.
        num_axes: How many axes class indices have: that of the examples, and before it those of the tasks.

    Raises:
        ValueError: Saying how to get class indices.
    """
    # Of numbers the likelihood says that they are no classes.
    if likelihood.target_kind == "classes" and targets.ndim != num_axes and not targets.is_floating_point():
        raise ValueError(
            f"{argument} has shape {tuple(targets.shape[num_axes - 1 :])}, but expected one class index per example, "
            "[num_examples]: of a column take y.squeeze(-1), of one-hot labels y.argmax(-1)."
        )


def require_finite_solution(
    algorithm: "Algorithm", solution: InnerSolution, support: Batch, *, with_norm: bool
) -> None:
    """Refuses what adaptation found if it is not finite.

    Args:
        algorithm: What adapted.
        solution: What it found.
        support: The support set.
        with_norm: Whether the norm of the inner gradient was computed.

    Raises:
        FloatingPointError: With the likely causes.
    """
    if bool(tree.all_finite(solution.value)) and not (with_norm and not math.isfinite(solution.grad_norm)):
        return
    largest = " and ".join(
        f"{float(values.abs().max()):.3g} among the {what}"
        for what, values in (("inputs", support.x), ("targets", support.y))
        if values.is_floating_point() and values.numel()
    )
    raise FloatingPointError(
        f"adapting to the {len(support.y)} support examples gives numbers that are not finite. Likely causes: values "
        f"of another scale than in training (as the network sees them, up to {largest or 'any'}), or inner steps that "
        f"are too large ({algorithm.describe()})."
    )


def require_finite_outputs(algorithm: "Algorithm", outputs: Any) -> None:
    """Refuses outputs of a prediction that are not finite.

    Raises:
        FloatingPointError: With the likely causes.
    """
    if not bool(tree.all_finite(outputs)):
        raise FloatingPointError(
            "the prediction is not finite. Likely causes: inputs of another scale than in training (a fill value such "
            f"as 1e20?), or inner steps that are too large ({algorithm.describe()})."
        )
