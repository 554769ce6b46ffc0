"""One meta-gradient taken apart: forward and backward half, number of passes, peak memory."""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ibaml import objectives, tree
from ibaml.algorithms import MetaParameters, TaskNll, TaskNoise
from ibaml.hypergradients import gaussian_implicit_hypergradient, implicit_hypergradient
from ibaml.model import Model
from ibaml.priors import DiagonalGaussian, PointPrior
from ibaml.types import Batch, Episode, Params, Tensor


class MetaGradientProblem(NamedTuple):
    """One task with all that one meta-gradient needs.

    Attributes:
        algorithm: MAML, iMAML, ABML or iBaML.
        nll: Per-example nll.
        meta: Where the gradient is taken.
        episode: Support and query set.
        noise: Noise of the weight samples.
    """

    algorithm: Any
    nll: TaskNll
    meta: MetaParameters
    episode: Episode
    noise: TaskNoise

    def adapt(self, meta: MetaParameters) -> Any:
        """Returns the result of K inner steps."""
        return self.algorithm.adapt(self.nll, meta, self.episode.support, self.noise).value

    def expected_nll(self, posterior: DiagonalGaussian, shared: Params, noise: Params, batch: Batch) -> Tensor:
        """Returns the expected nll of a distribution over weights."""
        return objectives.expected_nll(lambda weights, batch: self.nll(weights, shared, batch), posterior, noise, batch)

    def inner_loss(self, weights: Params, meta: MetaParameters) -> Tensor:
        """Returns the inner loss of iMAML: support nll and a pull towards the initial weights."""
        nll = self.nll(weights, meta.shared, self.episode.support).mean()
        centre = cast(Params, meta.prior)
        return nll + self.algorithm.proximal_strength * PointPrior().divergence(weights, centre)

    def outer_loss(self, adapted: Any, meta: MetaParameters) -> Tensor:
        """Returns the outer loss: the query nll; for ABML that of both sets and the KL divergence."""
        support, query = self.episode
        if not self.algorithm.is_bayesian:
            return self.nll(adapted, meta.shared, query).mean()
        query_loss = self.expected_nll(adapted, meta.shared, self.noise.outer, query)
        if getattr(self.algorithm, "outer", "elbo") != "elbo":
            return query_loss
        support_loss = self.expected_nll(adapted, meta.shared, self.noise.inner, support)
        num_support, num_query = len(support.y), len(query.y)
        loss = (num_support * support_loss + num_query * query_loss) / (num_support + num_query)
        weight = objectives.kl_weight(num_support + num_query, self.algorithm.temperature)
        return objectives.negative_elbo(loss, adapted, cast(DiagonalGaussian, meta.prior), weight)


def meta_gradient_in_halves(problem: MetaGradientProblem) -> Iterator[MetaParameters | None]:
    """Computes ``Algorithm.hypergradient`` with a stop between the forward and the backward half.

    Args:
        problem: The task.

    Yields:
        None when the forward half is done, then the meta-gradient.
    """
    if problem.algorithm.estimator == "unrolled":
        return _explicit_halves(problem)
    return _implicit_halves(problem)


def _explicit_halves(problem: MetaGradientProblem) -> Iterator[MetaParameters | None]:
    value, pullback = torch.func.vjp(lambda meta: problem.outer_loss(problem.adapt(meta), meta), problem.meta)[:2]
    yield None
    yield pullback(torch.ones_like(value))[0]


def _implicit_halves(problem: MetaGradientProblem) -> Iterator[MetaParameters | None]:
    algorithm, meta, support = problem.algorithm, problem.meta, problem.episode.support
    adapted = problem.adapt(meta)
    value, pullback = torch.func.vjp(problem.outer_loss, adapted, meta)[:2]
    yield None
    by_adapted, by_meta = pullback(torch.ones_like(value))
    # The graph of the query set; the library's own estimators let go of it before the linear solve as well.
    del pullback

    def linear_outer_loss(adapted: Any, meta: MetaParameters) -> Tensor:
        # Has the gradient of the outer loss here, and that is all that the estimators take from an outer loss.
        return tree.dot(by_adapted, adapted) + tree.dot(by_meta, meta)

    solver = algorithm.linear
    if not algorithm.is_bayesian:
        yield implicit_hypergradient(problem.inner_loss, linear_outer_loss, adapted, meta, solver)[0]
        return
    (prior, shared), _ = gaussian_implicit_hypergradient(
        lambda posterior, shared: problem.expected_nll(posterior, shared, problem.noise.inner, support),
        lambda posterior, prior, shared: linear_outer_loss(posterior, MetaParameters(prior, shared)),
        adapted,
        cast(DiagonalGaussian, meta.prior),
        objectives.kl_weight(len(support.y), algorithm.temperature),
        solver,
        shared=meta.shared,
        precondition=algorithm.precondition,
    )
    yield MetaParameters(prior, shared)


class PassCounter:
    """Counts gradients of a model's nll and products with its second derivatives.

    A probe sits in the network's outputs. Differentiating goes back through it once. A product with second derivatives
    goes back through that gradient, so through the derivative of the probe, and through the probe once more. Under
    ``torch.func.vmap`` every member of the batch counts.
    """

    def __init__(self) -> None:
        # Passages through the outputs, through their gradient, and back through that gradient.
        self._passages = [0, 0, 0]

    def _passed(self, order: int, num_members: int) -> None:
        self._passages[order] += num_members

    @property
    def num_gradients(self) -> int:
        """Gradients so far, one for every batch and weight sample."""
        return self._passages[1] - self._passages[2]

    @property
    def num_hvps(self) -> int:
        """Products so far, one for every batch and weight sample."""
        return self._passages[2]

    def watch(self, outputs: Tensor) -> Tensor:
        """Returns the outputs of a network with the probe in them."""
        return cast(Tensor, _Probe.apply(outputs, self._passed, 0, 1))

    def nll(self, model: Model) -> TaskNll:
        """Returns ``model.nll`` with the probe in it."""

        def counted(adapted: Params, shared: Params, batch: Batch) -> Tensor:
            outputs = self.watch(model.outputs(adapted, shared, batch.x))
            return model.likelihood.nll(outputs, batch.y, shared)

        return counted


class _Probe(torch.autograd.Function):
    """The identity; counts that it was passed and puts a probe of the next order into its derivative."""

    @staticmethod
    def forward(value: Tensor, passed: Callable[[int, int], None], order: int, num_members: int) -> Tensor:
        passed(order, num_members)
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        passed, order, num_members = ctx.arguments
        gradient = gradients[0]
        if order < 2:
            gradient = _Probe.apply(gradient, passed, order + 1, num_members)
        return gradient, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        value, passed, order, num_members = inputs
        return _Probe.apply(value, passed, order, num_members * info.batch_size), in_dims[0]


def peak_bytes_of(function: Callable[[], object], device: torch.device) -> int:
    """Returns the peak, during a call, of the bytes of all tensors that the call allocates.

    Args:
        function: What to call.
        device: Whose memory to look at.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    allocations = [event["args"] for event in events]
    if not allocations:
        return 0
    # The total carries what earlier profiles of the process saw allocated and not freed.
    before = allocations[0]["Total Allocated"] - allocations[0]["Bytes"]
    return max(each["Total Allocated"] for each in allocations) - before
