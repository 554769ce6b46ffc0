"""A network and a likelihood as pure functions of three groups of parameters.

``adapted`` parameters get a value per task, ``shared`` ones are meta-learned directly (one value for all tasks), and
``frozen`` ones never change. Which is which follows from name patterns.
"""

import dataclasses
import difflib
import fnmatch
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms.checks import advice_on_inputs, check_labels, check_targets
from ibaml.algorithms.guard import Guard, guard_of
from ibaml.algorithms.kernels import Kernels, kernels_of, require_rows_alone, time_first_layers
from ibaml.algorithms.nll import PlainNll
from ibaml.algorithms.tail import FEATURES, Lookup, Tail, find_tail, keeps_statistics
from ibaml.likelihoods import Likelihood
from ibaml.types import Batch, Episode, Params, Tensor

if TYPE_CHECKING:
    from ibaml.algorithms.base import Algorithm

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
        tail: The part of the network from the first adapted layer on, if it is known where that is.
        num_outputs: Classes or targets of a task, for heads that serve any number of them.
        guard: Lets one thread at a time use the network.
    """

    network: nn.Module
    likelihood: Likelihood
    adapted: Params
    shared: Params
    frozen: Params
    tail: Tail | None = None
    num_outputs: int = 1
    guard: Guard = dataclasses.field(default_factory=Guard, repr=False, compare=False)

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
        with self.guard:
            return self._kernels.call(self.network, {**self.frozen, **own, **adapted}, x)

    def features(self, shared: Params, x: Tensor) -> Tensor:
        """Returns what the adapted tail of the network sees, ``[num_examples, *feature_shape]``.

        Args:
            shared: Shared parameters.
            x: Inputs, ``[num_examples, *input_shape]``.

        Raises:
            ValueError: If it is not known where the adapted part begins.
        """
        if self.tail is None:
            raise ValueError(
                f"the adapted parameters ({', '.join(self.adapted)}) are not the last layers of the network "
                f"({type(self.network).__name__}): adapt its last linear layer alone, such as adapt='head.*'."
            )
        if isinstance(self.tail.body, Lookup):
            return shared[FEATURES][x]
        own = {**self.frozen, **{name: shared[name] for name in self.shared_names}}
        with self.guard:
            return self._kernels.call(self.tail.body, own, x)

    def splits(self, x: Tensor) -> bool:
        """Whether the network is its adapted tail on the features of its body, seen at the first inputs there are.

        Args:
            x: Inputs, ``[num_examples, *input_shape]``.
        """
        if self.tail is None:
            return False
        if self.tail.is_exact is None:
            if not len(x):
                return True  # Of nothing all features are right.
            # At weights of no special kind: a layer that starts at zero gives zeros, whatever comes before or after.
            weights = {
                name: value + torch.cos(torch.arange(value.numel()).to(value)).view_as(value)
                for name, value in self.adapted.items()
            }
            with torch.no_grad():
                expected = self.outputs(weights, self.shared, x)
                try:
                    features = self.features(self.shared, x)
                    positions = torch.arange(len(x), device=x.device)
                    found = self.on_features.outputs(weights, self.with_features(self.shared, features), positions)
                except Exception:  # noqa: BLE001 - a network may ask anything of the layer that is missing
                    self.tail.is_exact = False
                else:
                    self.tail.is_exact = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4)
        return self.tail.is_exact

    @functools.cached_property
    def on_features(self) -> "Model":
        """The adapted tail as a model of its own: inputs are positions among ``with_features``."""
        assert self.tail is not None
        network = self.tail.network
        names = {name for name, _ in network.named_parameters()}
        kept = self.with_features(self.shared, torch.empty(0))
        return dataclasses.replace(
            self,
            network=network,
            shared=kept,
            frozen={name: value for name, value in self.frozen.items() if name in names},
            tail=self.tail.on_features(),
        )

    def with_features(self, shared: Params, features: Tensor) -> Params:
        """Returns the shared parameters of ``on_features``: those of tail and likelihood, and some features."""
        assert self.tail is not None
        kept = {name for name, _ in self.tail.network.named_parameters()} | set(self.likelihood.initial_parameters())
        return {**{name: value for name, value in shared.items() if name in kept}, FEATURES: features}

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

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the running averages among the shared parameters, which no gradient moves."""
        return frozenset() if self.tail is None else self.tail.statistics

    def training_features(self, shared: Params, x: Tensor) -> tuple[Tensor, Params]:
        """Returns the features of all examples of a training step, and the running averages that they move.

        Args:
            shared: Shared parameters.
            x: Inputs of all tasks, ``[num_examples, *input_shape]``.
        """
        if self.tail is None or not self.statistics:
            return self.features(shared, x), {}
        # The pass overwrites the averages that it is given. In the order of the parameters, not in a set's: it differs
        # between processes, which add these up.
        moved = {name: value.detach().clone() for name, value in shared.items() if name in self.statistics}
        counters = {
            name: value.clone()
            for name, value in self.tail.body.named_buffers()
            if name.endswith("num_batches_tracked")
        }
        own = {**self.frozen, **{name: shared[name] for name in self.shared_names}, **moved, **counters}
        with self.guard:
            return self._kernels.call(self.tail.training_body, own, x), moved

    @property
    def examples_stand_alone(self) -> bool:
        """Whether those of a task need not pass through the network apart from those of others."""
        body = self.network if self.tail is None else self.tail.body
        return not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None  # pyright: ignore[reportPrivateUsage]
            for module in body.modules()
        )

    def most_outputs(self, algorithm: "Algorithm", num_outputs: int, *targets: Tensor) -> int:
        """Returns how many classes there are where the algorithm serves any number, else the number of outputs.

        Args:
            algorithm: What adapts.
            num_outputs: Outputs of the network.
            *targets: Class indices.
        """
        if not algorithm.serves_any_number_of_outputs or any(each.is_floating_point() for each in targets):
            return num_outputs
        return 1 + max(int(each.max()) for each in targets if len(each))

    def of_task(self, algorithm: "Algorithm", *targets: Tensor) -> "Model":
        """Returns the model with the number of classes of a task, where the algorithm serves any number.

        Args:
            algorithm: What adapts.
            *targets: Class indices of all sets of the task.
        """
        return dataclasses.replace(self, num_outputs=self.most_outputs(algorithm, self.num_outputs, *targets))

    def check_features(self, algorithm: "Algorithm", x: Tensor) -> None:
        """Refuses a network without features for an algorithm that is a head on them.

        Args:
            algorithm: What adapts.
            x: Inputs of one task.

        Raises:
            ValueError: If the adapted parameters are not the last linear layer.
        """
        if not algorithm.uses_features:
            return
        if not x.is_floating_point():
            # Before torch says it in its own words; a network of tokens passes.
            self._num_outputs_at("the inputs", x)
        if not self.splits(x):
            raise ValueError(
                f"algorithm {algorithm.name!r} takes the place of the network's last linear layer, but the adapted "
                f"parameters ({', '.join(self.adapted)}) are not those of the layer that gives the outputs of "
                f"{type(self.network).__name__}: name that layer, such as adapt='head.*', with nothing after it, or "
                "choose an algorithm that adapts any weights, such as algorithm='ibaml'."
            )
        with torch.no_grad():
            features = self.features(self.shared, x)
        if features.ndim != 2:
            raise ValueError(
                f"the last layer of the network sees features of shape {tuple(features.shape)}; algorithm "
                f"{algorithm.name!r} expects [num_examples, num_features]."
            )

    def check_task(
        self, episode: Episode, *, task: str = "task", algorithm: "Algorithm", needs_support: bool = True
    ) -> int:
        """Runs one task through the network and refuses what it cannot process; for the boundary, before long work.

        Args:
            episode: A single task, without a task axis.
            task: How messages call it.
            algorithm: What is to adapt, which may serve more classes than the network has outputs, or targets that were
                not measured.
            needs_support: Whether an empty support set is refused.

        Returns:
            The number of network outputs, or of classes if there are more.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        return max(
            self.check_batch(f"{task} {part}", batch, algorithm=algorithm)
            for part, batch in (("support", episode.support), ("query", episode.query))
            if part == "query" or needs_support or len(batch.y)
        )

    def check_batch(self, argument: str, batch: Batch, *, algorithm: "Algorithm") -> int:
        """Does what ``check_task`` does for one set of examples."""
        self.check_inputs(f"{argument}.x", batch.x)
        if batch.x.shape[0] == 0 or batch.x.shape[0] != batch.y.shape[0]:
            raise ValueError(
                f"{argument} has {batch.x.shape[0]} inputs and {batch.y.shape[0]} targets; expected as many of "
                "the one as of the other, and at least one."
            )
        check_labels(self.likelihood, f"{argument}.y", batch.y)
        num_outputs = self._num_outputs_at(argument, batch.x)
        if algorithm.serves_any_number_of_outputs and not batch.y.is_floating_point():
            num_outputs = max(num_outputs, 1 + int(batch.y.max()))
        check_targets(algorithm, self.likelihood, f"{argument}.y", batch.y, num_outputs)
        return num_outputs

    def _num_outputs_at(self, argument: str, x: Tensor) -> int:
        """Returns how many outputs the network gives at some inputs, by a pass of the first of their shape."""
        # Of integers, such as indices of tokens, each value may be refused.
        key = (x.shape, x.dtype, x.device) if x.is_floating_point() else None
        if key in self._seen:
            return self._seen[key]
        name, outputs_at = f"the network ({type(self.network).__name__})", torch.no_grad()(self.outputs)
        try:
            outputs: Any = outputs_at(self.adapted, self.shared, x)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{name} cannot process {argument}.x of shape {tuple(x.shape)} and dtype {x.dtype}: "
                f"{error}{advice_on_inputs(self.network, x)}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"{name} returned a {type(outputs).__name__} for {argument}.x; expected one tensor, [num_examples, "
                "num_outputs]: let its forward return that alone, of a recurrent layer the last output."
            )
        if outputs.ndim != 2 or len(outputs) != len(x):
            raise ValueError(
                f"the network returned shape {tuple(outputs.shape)} for {argument}.x of shape {tuple(x.shape)}; "
                "expected [num_examples, num_outputs] (recurrent layers: batch_first=True)."
            )
        if (layers := time_first_layers(self.network)) and self.examples_stand_alone and len(x) > 1:
            require_rows_alone(name, layers, outputs_at(self.adapted, self.shared, x[-1:]), outputs)
        if key is not None:
            self._seen[key] = outputs.shape[-1]
        return outputs.shape[-1]

    @functools.cached_property
    def _kernels(self) -> Kernels:
        return kernels_of(self.network)

    @functools.cached_property
    def _seen(self) -> dict[Any, int]:
        return {}

    def check_inputs(self, argument: str, x: Tensor) -> None:
        """Refuses inputs with NaN or infinities.

        Raises:
            ValueError: Naming the argument, how many values are bad and in which example.
        """
        if not bool(tree.all_finite(x)):
            bad = torch.nonzero(~torch.isfinite(x))
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
    adapted = {name: value for name, value in values.items() if name in adapted_names}
    tail = find_tail(network, adapted)
    statistics = _statistics(network, tail)
    if kernels_of(network).attention_layers:
        _logger.warning(
            "%s has attention layers: torch's fused attention kernels are switched off, because they have no second "
            "derivatives.",
            type(network).__name__,
        )
    return Model(
        network=network,
        likelihood=likelihood,
        tail=tail,
        guard=guard_of(network),
        num_outputs=num_outputs_of(network),
        adapted=adapted,
        shared={
            **{name: value for name, value in values.items() if name not in adapted_names | frozen_names},
            **statistics,
            **likelihood.initial_parameters(),
        },
        frozen={name: value for name, value in values.items() if name in frozen_names},
    )


def num_outputs_of(network: nn.Module) -> int:
    """Returns what a network says of itself, or the size of its last linear layer."""
    linear = [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]
    return int(getattr(network, "num_outputs", linear[-1] if linear else 1))


def _statistics(network: nn.Module, tail: Tail | None) -> Params:
    """Returns the running averages of layers that no task adapts, and refuses others."""
    known = frozenset[str]() if tail is None else tail.statistics
    for name, module in network.named_modules():
        if not keeps_statistics(module):
            continue
        mean = f"{name}.running_mean".lstrip(".")
        if mean not in known:
            raise ValueError(
                f"network has running statistics in {name or 'its root'} ({type(module).__name__}), which is not "
                "before the adapted layers: they would leak from task to task. Adapt the last layer alone "
                "(adapt='head.*'), or build it with track_running_stats=False (statistics of the batch at hand) or "
                "use GroupNorm."
            )
        if module.momentum is None:
            raise ValueError(f"{name or 'the network'} has momentum=None; expected a number such as 0.1.")
    buffers = dict(network.named_buffers())
    return {name: buffers[name].detach().clone() for name in sorted(known)}


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
