"""How much work a meta-gradient needs, and how much a candidate does."""

import contextlib
from collections.abc import Generator
from typing import NamedTuple

from torch import nn

from benchmarks.problems import EXPLICIT, Case
from ibaml.experiments.fig2.cost import PassCounter
from ibaml.types import Tensor

# A convolution (or a matrix product) y = w x has three products of the same size in a gradient: y, and the pullbacks
# of its gradient to x and to w. A Hessian-vector product goes back through these three, to both arguments of each: six.
GRADIENTS_PER_HVP = 2


class Work(NamedTuple):
    """Passes through the network for one task.

    Attributes:
        support_gradients: Gradients on the support set.
        query_gradients: Gradients on the query set.
        hvps: Hessian-vector products on the support set; to go back through an inner step is one.
    """

    support_gradients: int
    query_gradients: int
    hvps: int

    @property
    def num_gradients(self) -> int:
        """Gradients on either set."""
        return self.support_gradients + self.query_gradients


def needed_work(case: Case) -> Work:
    """Returns the passes that an algorithm cannot do without, whoever computes it.

    MAML: K inner gradients, the outer one, and K products to go back. Implicit: K inner gradients, the outer one, the
    gradient whose graph the L products go through. ABML has the support set in its outer loss as well. Everything
    that goes through S weight samples counts S times.
    """
    if case.algorithm in EXPLICIT:
        in_outer_loss = 1 if case.algorithm == "abml" else 0
        work = Work(case.num_inner_steps + in_outer_loss, 1, case.num_inner_steps)
    else:
        assert case.num_linear_steps is not None
        work = Work(case.num_inner_steps + 1, 1, case.num_linear_steps)
    num_samples = case.num_samples if case.algorithm in ("abml", "ibaml") else 1
    return Work(*(num_samples * count for count in work))


def gradient_equivalents(case: Case) -> float:
    """Returns the needed work in units of one gradient on the support set; a query set counts by its size."""
    work = needed_work(case)
    return (
        work.support_gradients
        + work.query_gradients * case.num_queries / case.num_shots
        + GRADIENTS_PER_HVP * work.hvps
    )


@contextlib.contextmanager
def counted_passes(network: nn.Module) -> Generator[PassCounter]:
    """Counts how often anyone differentiates a network while the context is open.

    The network changes its class, because ``higher`` looks for the forward pass there and ignores hooks.
    """
    counter, original = PassCounter(), type(network)

    class Counted(original):
        def forward(self, x: Tensor) -> Tensor:
            return counter.watch(super().forward(x))

    network.__class__ = Counted
    try:
        yield counter
    finally:
        network.__class__ = original
