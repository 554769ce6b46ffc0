"""Losses of more examples than fit into memory at once."""

import functools

from torch import nn

from ibaml import tree
from ibaml.algorithms.nll import Nll
from ibaml.priors import Prior
from ibaml.solvers.curvature import DifferentiatedLoss
from ibaml.types import Batch, Params, PyTree, Tensor


class NllInParts:
    """Passes at most so many examples through a network at a time and averages losses and gradients.

    The nll per example, which the predictive nll needs, is computed at once.

    Args:
        nll: Of the parts; one that keeps no graph, as that by programs.
        max_examples: Most examples of a part.
        network: Whose examples must stand alone.

    Raises:
        ValueError: If ``max_examples`` is below 1, or the network has batch normalisation.
    """

    def __init__(self, nll: Nll, max_examples: int, network: nn.Module) -> None:
        if max_examples < 1:
            raise ValueError(f"max_examples_per_pass must be at least 1 or None, but is {max_examples}.")
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                raise ValueError(
                    f"max_examples_per_pass is {max_examples}, but {name or 'the network'} ({type(module).__name__}) "
                    "normalises all examples of a batch together, so they cannot be passed in parts: use GroupNorm "
                    "(norm='group'), or leave max_examples_per_pass at None."
                )
        self._nll = nll
        self._max_examples = max_examples

    @property
    def num_outputs(self) -> int:
        """See ``Nll``."""
        return self._nll.num_outputs

    def features(self, shared: Params, x: Tensor, /) -> Tensor:
        """See ``Nll``."""
        return self._nll.features(shared, x)

    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """See ``Nll``."""
        return self._nll.per_example(weights, shared, batch)

    def mean(self, batch: Batch, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""
        return _averaged([(len(part.y), self._nll.mean(part, twice=twice)) for part in self._parts(batch)])

    def expected(self, family: Prior, batch: Batch, noise: Params, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""
        losses = [(len(part.y), self._nll.expected(family, part, noise, twice=twice)) for part in self._parts(batch)]
        return _averaged(losses)

    def _parts(self, batch: Batch) -> list[Batch]:
        size = self._max_examples
        return [Batch(*part) for part in zip(batch.x.split(size), batch.y.split(size), strict=True)]


def _averaged(losses: list[tuple[int, DifferentiatedLoss]]) -> DifferentiatedLoss:
    """Averages losses with weights in proportion to the numbers of examples."""
    total = sum(count for count, _ in losses)

    def average(kind: str, arguments: tuple[PyTree, ...]) -> PyTree:
        terms = (tree.scale(count / total, getattr(loss, kind)(*arguments)) for count, loss in losses)
        return functools.reduce(tree.add, terms)

    return DifferentiatedLoss(
        lambda *arguments: average("value_and_gradient", arguments),
        lambda *arguments: average("gradient", arguments),
        lambda *arguments: average("value", arguments),
    )
