"""The library's hypergradient of one task watched from its nll: end of the forward half, passes, peak memory."""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ibaml.algorithms import MetaParameters, TaskNoise
from ibaml.algorithms.gradient_based import GradientBased
from ibaml.algorithms.model import Model
from ibaml.algorithms.nll import FunctionNll, Nll
from ibaml.types import Batch, Episode, Params, Tensor


class HypergradientProblem(NamedTuple):
    """One task with all that one hypergradient needs.

    Attributes:
        algorithm: MAML, iMAML, ABML or iBaML.
        nll: Nll of the task's examples.
        meta: Where the gradient is taken.
        episode: Support and query set.
        noise: Noise of the weight samples.
    """

    algorithm: GradientBased
    nll: Nll
    meta: MetaParameters
    episode: Episode
    noise: TaskNoise

    def hypergradient(self, on_forward: Callable[[], None] = lambda: None) -> MetaParameters:
        """Returns the library's hypergradient.

        Args:
            on_forward: Called whenever the value of the outer loss is a pass nearer; the last call is the end of the
                forward half.
        """
        query = self.episode.query
        # After the query set an unrolled gradient (ABML's outer loss) may look at the support set, and then goes back
        # without a further pass. An implicit one looks at the support set for its curvature, on the way back.
        is_unrolled = self.algorithm.estimator == "unrolled"

        def watched(adapted: Params, shared: Params, batch: Batch) -> Tensor:
            value = self.nll.per_example(adapted, shared, batch)
            if is_unrolled or batch is query:
                on_forward()
            return value

        return self.algorithm.hypergradient(FunctionNll(watched), self.meta, self.episode, self.noise)[0]


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

    def nll(self, model: Model) -> Nll:
        """Returns the model's nll with the probe in it."""

        def counted(adapted: Params, shared: Params, batch: Batch) -> Tensor:
            outputs = self.watch(model.outputs(adapted, shared, batch.x))
            return model.likelihood.nll(outputs, batch.y, shared)

        return FunctionNll(counted)


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
