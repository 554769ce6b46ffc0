"""Checks of what goes into an algorithm and of what comes out of it."""

import contextlib
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms.kernels import advice_on_torch_func, is_beyond_torch_func
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


def check_targets(
    algorithm: "Algorithm", likelihood: Likelihood, argument: str, targets: Tensor, num_outputs: int
) -> None:
    """Refuses targets that a likelihood cannot score, or that an algorithm cannot learn from.

    Args:
        algorithm: What adapts to them, or is judged by them.
        likelihood: What the targets are of.
        argument: How messages call the targets.
        targets: Class indices or numbers; NaN among several targets of an example: not measured.
        num_outputs: Network outputs, or classes.

    Raises:
        ValueError: Naming the argument, what came and what to do.
    """
    if targets.is_floating_point() and targets.ndim > 1 and targets.shape[-1] > 1:
        is_missing = targets.isnan()
        if num_missing := int(is_missing.sum()):
            if not algorithm.serves_unmeasured_targets:
                raise ValueError(
                    f"{argument} has {num_missing} targets that were not measured (NaN), and algorithm "
                    f"{algorithm.name!r} needs all targets of an example: drop such examples, fit a learner for each "
                    "target on its own, or for numbers with Gaussian noise use likelihood='gaussian' with "
                    "algorithm='head', which learns each target from the examples where it was measured."
                )
            if num_empty := int(is_missing.all(-1).sum()):
                raise ValueError(
                    f"{argument} has {num_empty} examples of which no target was measured (all are NaN): drop them."
                )
            targets = torch.where(is_missing, 0.0, targets)
    likelihood.check_targets(argument, targets, num_outputs)


def advice_on_inputs(network: nn.Module, x: Tensor) -> str:
    """Returns what to do where a network cannot process its inputs: whole numbers, or indices that were scaled."""
    if not x.is_floating_point():
        return " Give images of 0..255 as x.float() / 255, numbers as x.float()."
    if not any(isinstance(layer, nn.Embedding) for layer in network.modules()):
        return ""
    return (
        " Inputs of pairs (X, y) are scaled as numbers are: give token ids as Episodes of int64 tensors, or to the "
        "network without its last layer, MetaLearner(backbone=module), with fine_tune='*' to train it."
    )


@contextlib.contextmanager
def explained_failures(network: nn.Module, num_examples: int) -> Generator[None]:
    """Says what to do where an adaptation does not fit into memory or a network does not fit ``torch.func``.

    Args:
        network: The network.
        num_examples: Size of the support set.

    Raises:
        MemoryError: Instead of those of torch, which are of many kinds.
        TypeError: If the network does what functional derivatives do not support.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_beyond_torch_func(error):
            raise TypeError(advice_on_torch_func(network, error)) from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error):
            raise MemoryError(
                f"adapting to {num_examples} support examples at once does not fit into memory: pass a random part of "
                f"them, as a prior matters little where examples are many. ({str(error).splitlines()[0]}.)"
            ) from error
        raise


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
    # An infinite value may be meant, such as the scale of neighbours that all count alike.
    has_nan = not bool(tree.all_finite(solution.value)) and any(
        bool(torch.isnan(leaf).any()) for leaf in tree.leaves(solution.value)
    )
    if not has_nan and not (with_norm and not math.isfinite(solution.grad_norm)):
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
