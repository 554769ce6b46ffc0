"""The nll of one task's examples as a function of weights, or of a distribution over them.

An algorithm knows no network: it asks an ``Nll`` for losses of the inner variable. ``PlainNll`` derives them from the
nll per example by ``torch.func``; ``ibaml.algorithms.model.Model`` is one. ``ibaml.fast`` has one that is sooner done.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ibaml.algorithms import objectives
from ibaml.priors import Prior
from ibaml.solvers.curvature import DifferentiatedLoss, differentiated
from ibaml.types import Batch, Params, Tensor


class Nll(Protocol):
    """Losses of one set of examples, in nats; functions of the inner variable first, and of the shared parameters."""

    @property
    def num_outputs(self) -> int:
        """Classes or targets of the task."""
        ...

    def features(self, shared: Params, x: Tensor, /) -> Tensor:
        """Returns what the adapted end of a network sees, ``[num_examples, *feature_shape]``; for heads.

        Raises:
            ValueError: If there is no such thing.
        """
        ...

    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """Returns the nll of each example, ``[num_examples]``.

        Args:
            weights: Adapted parameters of one task.
            shared: Shared parameters.
            batch: Examples.
        """
        ...

    def mean(self, batch: Batch, /, *, twice: bool = False) -> DifferentiatedLoss:
        """Returns the mean nll over the examples, ``(weights, shared) -> scalar``, twice differentiable in both.

        Args:
            batch: Examples.
            twice: Announces that its gradient will be differentiated, which may spare a pass.
        """
        ...

    def expected(self, family: Prior, batch: Batch, noise: Params, /, *, twice: bool = False) -> DifferentiatedLoss:
        """Returns the mean nll over examples and weight samples, ``(posterior, shared) -> scalar``.

        Args:
            family: Of the posterior.
            batch: Examples.
            noise: Standard normal values, with a leading axis of samples.
            twice: As in ``mean``.
        """
        ...


class PlainNll(abc.ABC):
    """Everything from the nll per example, which a subclass gives, by ``torch.func``."""

    @abc.abstractmethod
    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """See ``Nll``."""

    num_outputs: int = 1
    """See ``Nll``."""

    def features(self, shared: Params, x: Tensor, /) -> Tensor:
        """See ``Nll``.

        Raises:
            ValueError: Unless a subclass has features.
        """
        raise ValueError(f"{type(self).__name__} has no features for a head: use a model of a network.")

    @property
    def is_small(self) -> bool:
        """Whether several weight samples, or tasks, at once are sooner done than one after the other."""
        return False

    def mean(self, batch: Batch, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""
        del twice
        return differentiated(lambda weights, shared: self.per_example(weights, shared, batch).mean())

    def expected(self, family: Prior, batch: Batch, noise: Params, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""
        del twice

        def expected(posterior: Any, shared: Params) -> Tensor:
            def of_weights(weights: Params, examples: Batch) -> Tensor:
                return self.per_example(weights, shared, examples)

            member = _Member(family, posterior)
            return objectives.expected_nll(of_weights, member, noise, batch, vectorize=self.is_small)

        return differentiated(expected)


class FunctionNll(PlainNll):
    """The nll of any function.

    Args:
        function: ``(weights, shared, batch) -> nll per example``.
    """

    def __init__(self, function: Callable[[Params, Params, Batch], Tensor]) -> None:
        self._function = function

    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """See ``Nll``."""
        return self._function(weights, shared, batch)


class _Member(NamedTuple):
    """A distribution together with its family: what can be sampled."""

    family: Prior
    value: Any

    def sample(self, noise: Params) -> Params:
        return self.family.sample(self.value, noise)
