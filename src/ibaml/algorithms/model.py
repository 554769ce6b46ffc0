"""A network and a likelihood as pure functions of three groups of parameters.

``adapted`` parameters get a value per task, ``shared`` ones are meta-learned directly (one value for all tasks), and
``frozen`` ones never change. Which is which follows from name patterns.
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import logging
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ibaml.algorithms.nll import PlainNll
from ibaml.likelihoods import Likelihood
from ibaml.types import Batch, Episode, Params, Tensor

_logger = logging.getLogger(__name__)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LARGEST_SMALL = 50_000  # Weights; measured.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(PlainNll):
    """A network seen as a function of its parameters.

    Attributes:
        network: The module itself: put in evaluation mode and moved by ``to``; its parameter values are not used again.
        likelihood: Turns outputs and targets into an nll.
        adapted: Initial values of the parameters that each task adapts.
        shared: Initial values of the parameters that are meta-learned directly, the likelihood's own among them.
        frozen: Parameters that stay as they are.
    """

    network: nn.Module
    likelihood: Likelihood
    adapted: Params
    shared: Params
    frozen: Params

    @property
    def shared_names(self) -> frozenset[str]:
        """Names of the shared parameters that belong to the network rather than to the likelihood."""
        return frozenset(self.shared) - frozenset(self.likelihood.initial_parameters())

    def outputs(self, adapted: Params, shared: Params, x: Tensor) -> Tensor:
        """Returns the network's outputs for given parameter values.

        Args:
            adapted: Adapted parameters of one task.
            shared: Shared parameters.
            x: Inputs, ``[num_examples, *input_shape]``.

        Returns:
            ``[num_examples, num_outputs]``.
        """
        own = {name: value for name, value in shared.items() if name in self.shared_names}
        with second_derivative_kernels(self.network):
            return torch.func.functional_call(self.network, {**self.frozen, **own, **adapted}, (x,))

    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """Returns the negative log-likelihood per example in nats, ``[num_examples]``."""
        return self.likelihood.nll(self.outputs(weights, shared, batch.x), batch.y, shared)

    @property
    def is_convolutional(self) -> bool:
        """Whether the network has convolutions: passing several sets of weights at once gains nothing then."""
        return any(isinstance(each, _CONVOLUTIONS) for each in self.network.modules())

    @property
    def is_small(self) -> bool:
        """Whether several weight samples, or tasks, at once are sooner done than one after the other (on a CPU)."""
        return not self.is_convolutional and sum(leaf.numel() for leaf in self.adapted.values()) <= _LARGEST_SMALL

    def check_task(self, episode: Episode, *, task: str = "task") -> int:
        """Runs one task through the network and refuses what it cannot process; for the boundary, before long work.

        Args:
            episode: A single task, without a task axis.
            task: How messages call it.

        Returns:
            The number of network outputs.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        outputs = None
        for part, batch in (("support", episode.support), ("query", episode.query)):
            self.check_inputs(f"{task} {part}.x", batch.x)
            if batch.x.shape[0] == 0 or batch.x.shape[0] != batch.y.shape[0]:
                raise ValueError(
                    f"{task} {part} has {batch.x.shape[0]} inputs and {batch.y.shape[0]} targets; expected as many of "
                    "the one as of the other, and at least one."
                )
            try:
                with torch.no_grad():
                    outputs = self.outputs(self.adapted, self.shared, batch.x)
            except (RuntimeError, ValueError, TypeError) as error:
                raise ValueError(
                    f"the network ({type(self.network).__name__}) cannot process {task} {part}.x of shape "
                    f"{tuple(batch.x.shape)} and dtype {batch.x.dtype}: {error}"
                ) from error
            if outputs.ndim != 2:
                raise ValueError(
                    f"the network returned shape {tuple(outputs.shape)} for {task} {part}.x of shape "
                    f"{tuple(batch.x.shape)}; expected [num_examples, num_outputs]."
                )
            self.likelihood.check_targets(f"{task} {part}.y", batch.y, outputs.shape[-1])
        assert outputs is not None
        return outputs.shape[-1]

    def check_inputs(self, argument: str, x: Tensor) -> None:
        """Refuses inputs with NaN or infinities.

        Raises:
            ValueError: Naming the argument, how many values are bad and in which example.
        """
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            bad = torch.nonzero(~finite)
            raise ValueError(
                f"{argument} has {len(bad)} NaN or infinite values, the first at index {tuple(bad[0].tolist())}: "
                "drop or impute them."
            )

    def to(self, device: torch.device) -> "Model":
        """Returns the model with all parameters on a device."""
        return dataclasses.replace(
            self,
            network=self.network.to(device),
            adapted={name: value.to(device) for name, value in self.adapted.items()},
            shared={name: value.to(device) for name, value in self.shared.items()},
            frozen={name: value.to(device) for name, value in self.frozen.items()},
        )


@contextlib.contextmanager
def second_derivative_kernels(network: nn.Module) -> Generator[None, None, None]:
    """Switches to kernels that can be differentiated twice: math attention, and recurrent layers without cuDNN."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if _has_attention(network):
            stack.enter_context(_SeenByTorchFunction())
        if torch.backends.cudnn.is_available() and any(isinstance(m, nn.RNNBase) for m in network.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class _SeenByTorchFunction(TorchFunctionMode):
    """Changes nothing, but attention layers that see it leave their fused inference kernel, which has no derivatives.

    ``torch.backends.mha.set_fastpath_enabled`` would do so for all threads of the process.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return func(*args, **(kwargs or {}))


def _has_attention(network: nn.Module) -> bool:
    return any(isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) for module in network.modules())


def build_model(
    network: nn.Module, likelihood: Likelihood, *, adapt: str | Sequence[str] = "*", freeze: str | Sequence[str] = ()
) -> Model:
    """Splits a network's parameters by name patterns.

    Args:
        network: Any module whose forward takes one batch of inputs. Its own parameter tensors are copied, not changed.
            It is put in evaluation mode: dropout would make the inner problem a random function without a Hessian.
        likelihood: Likelihood of the targets.
        adapt: Shell-style patterns of parameters that each task adapts, such as ``"head.*"``.
        freeze: Patterns of parameters that never change; parameters with ``requires_grad=False`` are frozen as well. A
            parameter that matches neither is shared.

    Raises:
        ValueError: If a pattern matches nothing, nothing is left to adapt, or a normalisation layer keeps running
            statistics.

    Examples:
        >>> from ibaml.likelihoods import Categorical
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> model = build_model(network, Categorical(), adapt="2.*")
        >>> sorted(model.adapted), sorted(model.shared)
        (['2.bias', '2.weight'], ['0.bias', '0.weight'])
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:  # pyright: ignore[reportPrivateUsage]
            raise ValueError(
                f"network has running statistics in {name or 'its root'} ({type(module).__name__}): they leak from "
                "task to task and have no place in a pure function. Build it with track_running_stats=False "
                "(statistics of the batch at hand) or use GroupNorm."
            )
    values = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    adapted_names = _match("adapt", adapt, values)
    frozen_names = _match("freeze", freeze, values)
    frozen_names |= {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    adapted_names -= frozen_names
    if not adapted_names:
        raise ValueError(
            f"adapt={adapt!r} and freeze={freeze!r} leave no parameter to adapt, out of {sorted(values)}: "
            "name at least one that is neither in freeze nor has requires_grad=False."
        )
    clash = sorted(values.keys() & likelihood.initial_parameters().keys())
    if clash:
        raise ValueError(f"network has parameters named {clash}, as the likelihood has: rename that submodule.")
    network.eval()
    if _has_attention(network):
        _logger.warning(
            "%s has attention layers: torch's fused attention kernels are switched off, because they have no second "
            "derivatives.",
            type(network).__name__,
        )
    return Model(
        network=network,
        likelihood=likelihood,
        adapted={name: value for name, value in values.items() if name in adapted_names},
        shared={
            **{name: value for name, value in values.items() if name not in adapted_names | frozen_names},
            **likelihood.initial_parameters(),
        },
        frozen={name: value for name, value in values.items() if name in frozen_names},
    )


def _match(argument: str, patterns: str | Sequence[str], names: Params) -> set[str]:
    """Returns the names that match any of the patterns."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = set(fnmatch.filter(names, pattern))
        if not found:
            nearest = difflib.get_close_matches(pattern, list(names), n=1, cutoff=0.0)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches none of the parameters {sorted(names)}.{hint}")
        matched |= found
    return matched
