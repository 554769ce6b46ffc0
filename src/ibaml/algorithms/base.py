"""What every algorithm is: initial meta-parameters, adaptation to a task, a hypergradient, and predictions."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch

from ibaml.algorithms.nll import Nll
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor

Estimator: TypeAlias = Literal["unrolled", "first_order", "implicit"]
"""Kinds of hypergradient: the derivative of the outer loss through the steps that were taken, exact for any number of
them; one that leaves a part out; or that of the solution of the inner problem, exact where it is solved."""


class MetaParameters(NamedTuple):
    """All that is learned over tasks.

    Attributes:
        prior: What the algorithm's ``init`` made: a member of a family of priors over what is adapted, which for
            algorithms on weights is the initial weights, or the parameters of a head.
        shared: Parameters that are the same for all tasks.
    """

    prior: Any
    shared: Params


class TaskNoise(NamedTuple):
    """Standard normal noise of one task; empty dicts for weights algorithms.

    Attributes:
        inner: For the expected nll of the support set, leading axis ``num_samples``.
        outer: For the outer loss, leading axis ``num_samples``.
    """

    inner: Params
    outer: Params


class Network(Protocol):
    """A network as a function of its parameters, as predictions see it."""

    def outputs(self, adapted: Params, shared: Params, x: Tensor, /) -> Tensor:
        """Returns the outputs, ``[num_examples, num_outputs]``."""
        ...

    def features(self, shared: Params, x: Tensor, /) -> Tensor:
        """Returns the inputs of the last linear layer, ``[num_examples, num_features]``."""
        ...


class Algorithm(Protocol):
    """An algorithm with its settings: a frozen dataclass, stateless. Meta-parameters and noise are arguments.

    Attributes:
        name: Name for reports.
        uses_features: Whether a task is solved from the features before the last layer, and not by passes of weights.
        is_bayesian: Whether adaptation gives a distribution over weights.
        serves_unmeasured_targets: Whether some of several targets of an example may be NaN, not measured: each is then
            learned from the examples where it was measured.
        estimator: How a hypergradient is computed, and with it where it is the derivative of its outer loss.
    """

    name: ClassVar[str]
    uses_features: ClassVar[bool]
    is_bayesian: ClassVar[bool]
    serves_unmeasured_targets: ClassVar[bool]
    estimator: ClassVar[Estimator]

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """Whether what was learned with some number of classes serves tasks with another."""
        ...

    @property
    def is_sequential(self) -> bool:
        """Whether ``update`` takes further examples in from the posterior alone."""
        ...

    @property
    def temperature(self) -> float | None:
        """Weight of the prior beside Bayes' rule, which is 1; None for algorithms without a posterior."""
        ...

    @property
    def num_curvature_points(self) -> int:
        """At how many points a hypergradient takes Hessian-vector products; their passes may be kept."""
        ...

    def describe(self) -> str:
        """Returns how a task is solved and differentiated, in a few words for reports and messages."""
        ...

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters.

        Args:
            adapted: Initial values of the adapted parameters; they become the prior mean.
            shared: Initial values of the shared parameters.
            generator: Source of randomness.
        """
        ...

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Draws the noise of one task."""
        ...

    def adapt(
        self,
        nll: Nll,
        meta: MetaParameters,
        support: Batch,
        noise: TaskNoise,
        *,
        start: Any = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        """Solves the inner problem of one task.

        Args:
            nll: Nll of the examples of a task.
            meta: Meta-parameters.
            support: Support set. If ``is_bayesian`` it may be empty: the posterior is then the prior.
            noise: Noise of the task.
            start: Where the inner solver starts; the problem itself stays the same. None: at the prior.
            with_grad_norm: False spares the gradient at the solution; its norm is then NaN.

        Returns:
            The posterior: a member of the prior's family, or the solution of a head.
        """
        ...

    def update(self, nll: Nll, meta: MetaParameters, posterior: Any, more: Batch) -> InnerSolution | None:
        """Returns the posterior of all examples so far and some more; None unless ``is_sequential``.

        Args:
            nll: Nll of the examples of a task.
            meta: Meta-parameters.
            posterior: What ``adapt`` or ``update`` returned for the examples so far.
            more: Further examples of the same task.
        """
        ...

    def hypergradient(
        self, nll: Nll, meta: MetaParameters, episode: Episode, noise: TaskNoise, *, with_grad_norm: bool = True
    ) -> tuple[MetaParameters, HypergradientInfo]:
        """Returns one task's gradient of the outer loss in the meta-parameters.

        Args:
            nll: Nll of the examples of a task.
            meta: Meta-parameters.
            episode: Support and query set.
            noise: Noise of the task.
            with_grad_norm: False may spare the inner gradient at the solution; its norm is then NaN.
        """
        ...

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Draws the noise of a prediction."""
        ...

    def outputs(self, network: Network, shared: Params, posterior: Any, x: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns what a likelihood makes a prediction of, by the names of its arguments.

        Args:
            network: The network.
            shared: Shared parameters.
            posterior: What ``adapt`` returned.
            x: Inputs of interest, ``[num_examples, *input_shape]``.
            noise: From ``draw_evaluation_noise``.

        Returns:
            ``"outputs"``, ``[num_samples, num_examples, num_outputs]``, and where they are known in closed form
            ``"output_variance"``, of the same shape. An algorithm of classes that knows better than its logits how
            foreign an example is to all classes of the task adds ``"out_of_task"``, ``[num_examples]``.
        """
        ...

    def draw_outputs(
        self, network: Network, shared: Params, posterior: Any, x: Tensor, *, generator: torch.Generator
    ) -> Tensor | None:
        """Returns outputs drawn jointly from a posterior in closed form, or None where ``outputs`` are draws already.

        Args:
            network: The network.
            shared: Shared parameters.
            posterior: What ``adapt`` returned.
            x: Inputs of interest.
            generator: Source of randomness.

        Returns:
            ``[num_draws, num_examples, num_outputs]``: one function a draw.
        """
        ...

    def mean_outputs(self, network: Network, shared: Params, posterior: Any, x: Tensor) -> Tensor:
        """Returns the outputs at the mean of the posterior, ``[num_examples, num_outputs]``."""
        ...

    def map_weights(self, function: Callable[[Params], Params], prior: Any) -> Any:
        """Applies a function of the adapted weights by name, such as flattening, to each such part of a prior."""
        ...

    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors of a prior that say where it is, and those that say how wide, on a log scale."""
        ...

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses a model that the algorithm cannot solve, before long work; most take any.

        Args:
            nll: Nll of the examples of a task.
            meta: Meta-parameters.
            episode: One task.
        """
        ...
