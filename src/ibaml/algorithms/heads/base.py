"""What heads share: a task owns a function of shared features, found exactly; the features are computed once.

With features ``z = phi(x; shared)`` the inner problem of a task is solved in closed form or by Newton's method to
convergence, so that the derivative of its solution by the implicit function theorem is exact (Zhang et al. 2023,
Theorem 2 with an error of zero). A head is a few functions of features; this class makes an ``Algorithm`` of them.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from ibaml import tree
from ibaml.algorithms.base import Estimator, MetaParameters, Network, TaskNoise
from ibaml.algorithms.nll import Nll
from ibaml.hypergradients.base import gradients_and_value
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor

Solution = TypeVar("Solution")


_NUM_DRAWS = 64


class HeadPosterior(NamedTuple, Generic[Solution]):
    """What a head knows of a task.

    Attributes:
        centre: What is subtracted from features first, ``[num_features]``.
        solution: What the head found: a pytree of tensors.
    """

    centre: Tensor
    solution: Solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(abc.ABC):
    """An algorithm whose adapted part is a head on shared features.

    Subclasses are functions of inputs ``z``, ``[num_examples, num_inputs]``: features, centred if asked for, and a
    constant 1 as the last. All of them must work under ``torch.func.vmap`` over tasks, and ``solve`` and
    ``outer_loss`` under ``torch.func.grad`` in prior, shared parameters and inputs, exactly.

    Attributes:
        centre: Whether the mean of the support set's features is subtracted from all features of a task.
    """

    name: ClassVar[str]
    is_bayesian: ClassVar[bool] = True
    estimator: ClassVar[Estimator] = "implicit"
    uses_features: ClassVar[bool] = True
    serves_unmeasured_targets: ClassVar[bool] = False

    centre: bool = False

    @property
    def num_curvature_points(self) -> int:
        """One: the solution."""
        return 1

    @property
    def is_sequential(self) -> bool:
        """Whether further examples are taken in from the solution alone: heads that override ``extend`` say so."""
        return False

    @property
    def temperature(self) -> float | None:
        """Weight of the prior beside Bayes' rule, which is 1; None for heads without a posterior."""
        return 1.0 if self.is_bayesian else None

    @property
    @abc.abstractmethod
    def serves_any_number_of_outputs(self) -> bool:
        """Whether what was learned with some number of classes serves tasks with another."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns how a task is solved, in a few words for reports and messages."""

    @abc.abstractmethod
    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> Any:
        """Returns the meta-parameters of the head that training starts from: a pytree of tensors.

        Args:
            num_inputs: Features of an example, and the constant.
            num_outputs: Classes or targets of the training tasks.
            like: Gives dtype and device.
        """

    @abc.abstractmethod
    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors of a prior that say where, and those that say how wide, on a log scale."""

    @abc.abstractmethod
    def solve(self, prior: Any, shared: Params, support: Batch, num_outputs: int) -> tuple[Any, Tensor]:
        """Solves the inner problem.

        Args:
            prior: Meta-parameters of the head.
            shared: Holds the likelihood's parameters, such as its noise variance.
            support: Inputs ``z`` and targets, of one task.
            num_outputs: Classes or targets of the task.

        Returns:
            The solution, and the norm of the inner gradient there relative to its terms, a detached scalar.
        """

    def extend(self, solution: Any, shared: Params, more: Batch, num_outputs: int) -> tuple[Any, Tensor] | None:
        """Returns what ``solve`` would for all examples so far and some more, or None if it takes all of them.

        Args:
            solution: From ``solve`` or ``extend``.
            shared: As in ``solve``.
            more: Inputs ``z`` and targets of further examples.
            num_outputs: Classes or targets of the task, those of ``more`` among them.
        """
        del solution, shared, more, num_outputs
        return None

    def in_products(self, solution: Any) -> Any:
        """Returns a solution of which ``predict`` takes products alone, for programs that know no factorisation.

        Inverses of triangular factors are in it, so that nothing is solved for a prediction. Nothing else is computed
        from it. Heads that solve nothing have it already.

        Args:
            solution: From ``solve`` or ``extend``.
        """
        return solution

    @abc.abstractmethod
    def predict(self, solution: Any, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns ``"outputs"``, ``[num_samples, num_examples, num_outputs]``, and maybe more, as ``outputs`` does.

        Args:
            solution: From ``solve``.
            shared: As there.
            inputs: ``z``, ``[num_examples, num_inputs]``.
            noise: From ``draw_evaluation_noise``.
        """

    def draw(self, solution: Any, inputs: Tensor, num_samples: int, *, generator: torch.Generator) -> Tensor | None:
        """Returns outputs drawn from the posterior, those of one draw together, or None if ``predict`` samples.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.
            num_samples: Number of draws.
            generator: Source of randomness.
        """
        del solution, inputs, num_samples, generator
        return None

    @abc.abstractmethod
    def outer_loss(self, solution: Any, shared: Params, query: Batch) -> Tensor:
        """Returns the loss of the query set, mean over its examples in nats, a scalar."""

    @abc.abstractmethod
    def mean(self, solution: Any, inputs: Tensor) -> Tensor:
        """Returns the outputs at the middle of the posterior, ``[num_examples, num_outputs]``."""

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters; see ``Algorithm``.

        Raises:
            ValueError: If the adapted parameters are not those of one linear layer.
        """
        del generator
        weights = [value for value in adapted.values() if value.ndim == 2]
        biases = [value for value in adapted.values() if value.ndim == 1]
        if len(weights) != 1 or len(weights) + len(biases) != len(adapted) or len(biases) > 1:
            raise ValueError(
                f"algorithm {self.name!r} takes the place of one linear layer, but the adapted parameters are "
                f"{', '.join(f'{name} {list(value.shape)}' for name, value in adapted.items())}: adapt the last "
                "linear layer alone, such as adapt='head.*', or choose an algorithm that adapts any weights, such as "
                "algorithm='ibaml'."
            )
        num_outputs, num_features = weights[0].shape
        return MetaParameters(self.init_prior(num_features + 1, num_outputs, like=weights[0]), shared)

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Returns no noise: nothing is sampled in training."""
        del meta, generator
        return TaskNoise({}, {})

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Returns no noise; a head that samples its predictions draws some."""
        del meta, generator
        return {}

    def map_weights(self, function: Any, prior: Any) -> Any:
        """Returns the prior itself: it is over no weights of the network."""
        del function
        return prior

    def for_task(self, nll: Nll) -> "Head":
        """Returns the head as it solves tasks of a model: itself, unless what it computes hangs on the likelihood."""
        del nll
        return self

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses what the head cannot solve; see ``Algorithm``."""
        del nll, meta, episode

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
        """Solves the inner problem of one task; see ``Algorithm``. ``start`` has no effect: there is one solution.

        Raises:
            ValueError: If there are no examples to be centred at.

        Cost:
            One pass of the support set through the network, and small linear algebra.
        """
        del noise, start, with_grad_norm
        features = nll.features(meta.shared, support.x)
        posterior, residual = self.for_task(nll)._posterior(meta, features, support.y, nll.num_outputs)
        return InnerSolution(posterior, residual, 0)

    def update(
        self, nll: Nll, meta: MetaParameters, posterior: HeadPosterior[Any], more: Batch
    ) -> InnerSolution | None:
        """Returns the posterior after further examples; see ``Algorithm``.

        Cost:
            One pass of the further examples through the network, and small linear algebra whose size does not depend on
            the number of earlier examples, but for the Gaussian process.
        """
        if not self.is_sequential:
            return None
        inputs = Batch(_inputs(nll.features(meta.shared, more.x), posterior.centre), more.y)
        found = self.extend(posterior.solution, meta.shared, inputs, nll.num_outputs)
        if found is None:
            return None
        solution, residual = found
        return InnerSolution(HeadPosterior(posterior.centre, solution), residual.detach(), 0)

    def hypergradient(
        self, nll: Nll, meta: MetaParameters, episode: Episode, noise: TaskNoise, *, with_grad_norm: bool = True
    ) -> tuple[MetaParameters, HypergradientInfo]:
        """Returns one task's gradient of the outer loss, exact by implicit differentiation; see ``Algorithm``."""
        del noise, with_grad_norm

        def objective(theta: MetaParameters) -> tuple[Tensor, tuple[HeadPosterior[Any], Tensor]]:
            return self.objective(nll, theta, episode)

        with torch.no_grad():
            (gradient,), loss, (posterior, residual) = gradients_and_value(objective, meta, has_aux=True)
        return gradient, solved_exactly(loss, residual, tree.detach(posterior))

    def objective(
        self, nll: Nll, meta: MetaParameters, episode: Episode
    ) -> tuple[Tensor, tuple[HeadPosterior[Any], Tensor]]:
        """Returns the outer loss at the solution, whose derivative is the hypergradient, the solution and its residual.

        Args:
            nll: Gives the features.
            meta: Meta-parameters.
            episode: A task.
        """
        head = self.for_task(nll)
        support, query = episode
        features = nll.features(meta.shared, support.x)
        posterior, residual = head._posterior(meta, features, support.y, nll.num_outputs)
        inputs = _inputs(nll.features(meta.shared, query.x), posterior.centre)
        return head.outer_loss(posterior.solution, meta.shared, Batch(inputs, query.y)), (posterior, residual)

    def outputs(
        self, network: Network, shared: Params, posterior: HeadPosterior[Any], x: Tensor, noise: Params
    ) -> dict[str, Tensor]:
        """Returns what a prediction is made of; see ``Algorithm``."""
        return self.predict(posterior.solution, shared, self.inputs(network, shared, posterior, x), noise)

    def draw_outputs(
        self, network: Network, shared: Params, posterior: HeadPosterior[Any], x: Tensor, *, generator: torch.Generator
    ) -> Tensor | None:
        """Returns outputs drawn from the posterior; see ``Algorithm``."""
        inputs = self.inputs(network, shared, posterior, x)
        return self.draw(posterior.solution, inputs, _NUM_DRAWS, generator=generator)

    def mean_outputs(self, network: Network, shared: Params, posterior: HeadPosterior[Any], x: Tensor) -> Tensor:
        """Returns the outputs at the middle of the posterior; see ``Algorithm``."""
        return self.mean(posterior.solution, self.inputs(network, shared, posterior, x))

    def inputs(self, network: Network, shared: Params, posterior: HeadPosterior[Any], x: Tensor) -> Tensor:
        """Returns the inputs ``z`` of the head at inputs of the network, ``[num_examples, num_inputs]``."""
        return _inputs(network.features(shared, x), posterior.centre)

    def _posterior(
        self, meta: MetaParameters, features: Tensor, targets: Tensor, num_outputs: int
    ) -> tuple[HeadPosterior[Any], Tensor]:
        if self.centre and not len(features):
            raise ValueError(
                "x_support is empty, but centre=True subtracts the mean of its features: give at least one example, or "
                "train with centre=False."
            )
        centre = features.mean(0) if self.centre else features.new_zeros(features.shape[1:])
        inputs = Batch(_inputs(features, centre), targets)
        solution, residual = self.solve(meta.prior, meta.shared, inputs, num_outputs)
        return HeadPosterior(centre, solution), residual.detach()


def solved_exactly(loss: Tensor, residual: Tensor, posterior: Any) -> HypergradientInfo:
    """Returns the diagnostics of a task, or of several, whose inner problem leaves nothing to a linear solver."""
    solved = torch.ones_like(residual, dtype=torch.bool)
    return HypergradientInfo(loss, residual, torch.zeros_like(residual), solved, posterior)


def _inputs(features: Tensor, centre: Tensor) -> Tensor:
    """Returns centred features with a constant 1 as the last column."""
    return torch.cat([features - centre, torch.ones_like(features[:, :1])], dim=-1)
