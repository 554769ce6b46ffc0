"""Generalised linear models on learned features: counts, outliers, noise that depends on the input.

For each target the model is ``y ~ p(y | f)`` with ``f = z.w`` and ``w ~ N(m, C C^T)``. In whitened weights,
``w = m + C e`` and ``X = Z C``, the inner loss is the nll of the support set and ``|e|^2 / 2``. Newton's method finds
its minimum ``e*`` (Rasmussen and Williams 2006, section 3.4), and Laplace's approximation of the posterior is

    e | y ~ N(e*, A^-1)        A = I + X^T diag(h) X        h = max(0, d2 nll / df2 at f*)

with the approximate marginal likelihood ``-log p(y) = nll(f*) + |e*|^2 / 2 + log det(A) / 2``. For Gaussian noise both
are exact, and the head is ``LinearGaussian``. An outlier of Student's t distribution, where the second derivative is
negative, counts as one that says nothing.

A likelihood may have further outputs, such as the logarithm of a variance. They are linear in the features with weights
that all tasks share, the means of their columns of the prior: given them, a task is weighted Bayesian regression.

The solution is differentiated by the implicit function theorem: one Newton step from it, with the Newton matrix held
fixed, of the second derivatives as they are, has its value and its derivative. Relatives: generalised linear mixed
models (without a hidden layer), robust regression.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms.base import MetaParameters
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.gaussian import HeadOfFunctions
from ibaml.algorithms.heads.least_squares import is_dual, log_determinant
from ibaml.algorithms.heads.linear_gaussian import Independent, Precision, Reduction, Root, in_products
from ibaml.algorithms.heads.newton import newton
from ibaml.algorithms.heads.separable import OfWeights, SeparableLoss
from ibaml.algorithms.nll import Nll
from ibaml.checks import require_positive_int
from ibaml.likelihoods import Likelihood
from ibaml.likelihoods.base import wide
from ibaml.likelihoods.mixture import NumberLikelihood
from ibaml.likelihoods.quadrature import expectation
from ibaml.priors import ColumnPrior, DiagonalColumnPrior
from ibaml.types import Batch, Episode, Params, Tensor

_TOLERANCE_EXPONENT = 0.6
"""As of softmax heads."""


def solves(likelihood: Likelihood) -> bool:
    """Whether the head knows a likelihood: one of numbers, whose prediction takes in the variance of outputs."""
    if not isinstance(likelihood, NumberLikelihood):
        return False
    one = likelihood.with_outputs(likelihood.num_outputs(1))
    outputs = torch.zeros(1, 1, one.num_outputs(1))
    try:
        one.predict(outputs, one.initial_parameters(), output_variance=torch.ones_like(outputs))
    except ValueError:
        return False
    return True


class LaplacePosterior(NamedTuple):
    """A Gaussian over the weights of each target, float64.

    Attributes:
        prior: The prior, which whitens inputs.
        mean: Modes of the weights of all outputs, ``[num_outputs, num_inputs]``, those of the targets first.
        spread: Covariances of the whitened weights.
        nll: Minus the log marginal likelihood of the support set, summed over targets, a scalar.
        support: Inputs and targets that it was found of.
    """

    prior: Any
    mean: Tensor
    spread: Precision | Reduction | Independent | Root
    nll: Tensor
    support: Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralizedLinear(HeadOfFunctions):
    """A head for any likelihood of numbers whose nll is twice differentiable in the first output of each target.

    Predictions and outer losses integrate over the Gaussian of each output, as the likelihood does it.

    Attributes:
        prior: Family of the prior over the weights of a target.
        likelihood: Likelihood of the targets, for use without a model; within one, that of the model counts.
        max_newton_steps: Newton steps at most. Three to eight suffice for counts, some twenty for outliers. Too few
            show in the norm of the inner gradient.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If a count is not an integer.
    """

    prior: ColumnPrior = DiagonalColumnPrior()
    likelihood: NumberLikelihood | None = None
    max_newton_steps: int = 50

    name: ClassVar[str] = "generalized_linear"

    def __post_init__(self) -> None:
        """Refuses settings that cannot work."""
        super().__post_init__()
        require_positive_int("max_newton_steps", self.max_newton_steps)
        if not hasattr(self.prior, "whiten"):
            raise ValueError(f"prior must be one of columns such as DiagonalColumnPrior(), but is {self.prior!r}.")

    def describe(self) -> str:
        """Returns how a task is solved."""
        return "Newton's method to convergence, Laplace posterior"

    def for_task(self, nll: Nll) -> Head:
        """Returns the head with the likelihood of the model; see ``Head``."""
        likelihood = getattr(nll, "likelihood", None)
        return self if likelihood is None else dataclasses.replace(self, likelihood=likelihood)

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses likelihoods that the head does not know; see ``Algorithm``.

        Raises:
            ValueError: If it is one of classes, or its prediction takes no variance, or it has outputs that all tasks
                share where the prior has no means for them.
        """
        likelihood = getattr(nll, "likelihood", None)
        if likelihood is not None and not solves(likelihood):
            raise ValueError(
                f"algorithm {self.name!r} is for likelihoods of numbers whose predictions take in the variance of "
                f"outputs, but the likelihood is {likelihood!r}: use one such as likelihood='poisson', or an algorithm "
                "for any likelihood such as 'ibaml'."
            )
        if likelihood is not None and likelihood.num_outputs(1) > 1 and (self.prior.tied or not len(meta.prior.mean)):
            raise ValueError(
                f"the likelihood {likelihood!r} has outputs that all tasks share, which are means of columns of the "
                f"prior, but the prior is {self.prior!r}: use one with tied=False and learn_mean=True."
            )
        super().check_task(nll, meta, episode)

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> Any:
        """Returns the first member of the prior's family; see ``Head``."""
        return self.prior.init(num_inputs, num_outputs, like=like)

    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns those of the prior's family; see ``Head``."""
        return self.prior.parameter_groups(prior)

    def solve(self, prior: Any, shared: Params, support: Batch, num_outputs: int) -> tuple[LaplacePosterior, Tensor]:
        """Finds the mode by Newton's method, and the Laplace posterior there; see ``Head``.

        Raises:
            ValueError: If the likelihood is not known.

        Cost:
            For each Newton step and target ``N R min(N, R)`` operations for ``R`` whitened features and ``N`` examples,
            and a Cholesky factorisation of ``min(N, R)`` rows.
        """
        tolerance = torch.finfo(wide(support.x)[0].dtype).eps ** _TOLERANCE_EXPONENT
        prior = tree.map(torch.Tensor.double, prior)
        loss, parameters = self._loss(shared)
        inputs, targets = support.x.double(), support.y.double().mT
        num_targets = len(targets)
        problem = OfWeights(self.prior.whiten(prior, inputs)[:num_targets])
        prior_mean = self.prior.mean(prior).expand(num_outputs, -1)
        offset, given = (prior_mean @ inputs.mT).tensor_split([num_targets])
        parameters = [given, *parameters]
        fixed, fixed_offset, *known = tree.detach((problem, offset, *parameters))
        unknown, residual, *_ = newton(
            fixed, loss, fixed_offset, targets, *known, max_steps=self.max_newton_steps, tolerance=tolerance
        )
        # Steps with clipped curvature end near the solution; one with the Newton matrix as it is squares what is left.
        slope, curvature = loss.derivatives(fixed_offset + fixed.outputs(unknown), targets, *known)
        unknown = unknown - fixed.solve_at(curvature, fixed.residual(unknown, -slope))
        # One more, differentiable in all but the Newton matrix and where it starts.
        _, curvature = loss.derivatives(fixed_offset + fixed.outputs(unknown), targets, *known)
        slope, _ = loss.derivatives(offset + problem.outputs(unknown), targets, *parameters)
        unknown = unknown - fixed.solve_at(curvature, problem.residual(unknown, -slope))
        outputs = offset + problem.outputs(unknown)
        rows, factor = problem.factorize(loss.derivatives(outputs, targets, *parameters)[1].clamp_min(0))
        nll = loss.total(outputs, targets, *parameters).sum() + 0.5 * (unknown**2).sum()
        spread: Precision | Reduction = Precision(factor)
        if is_dual(rows):
            spread = Reduction(torch.linalg.solve_triangular(factor, rows, upper=False), factor)
        padded = torch.cat([unknown, unknown.new_zeros(num_outputs - num_targets, unknown.shape[-1])])
        mean = prior_mean + self.prior.colour(prior, padded)
        nll = nll + 0.5 * log_determinant(factor).sum()
        return LaplacePosterior(prior, mean, spread, nll, Batch(inputs, support.y.double())), residual

    def marginal_nll(self, prior: Any, shared: Params, examples: Batch, num_outputs: int) -> Tensor:
        """Returns Laplace's approximation of minus the log marginal likelihood; see ``HasMarginal``.

        Raises:
            ValueError: If the likelihood is not known.

        Cost:
            That of ``solve``.
        """
        return self.solve(prior, shared, examples, num_outputs)[0].nll

    def in_products(self, solution: LaplacePosterior) -> LaplacePosterior:
        """Returns the posterior with a root of its covariance; see ``Head``."""
        return solution._replace(spread=in_products(solution.spread))

    def moments(self, solution: LaplacePosterior, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z.mean`` and ``z^T S z``, 0 for outputs that all tasks share; see ``HeadOfFunctions``."""
        inputs, num_targets = inputs.double(), solution.support.y.shape[-1]
        mean = solution.mean @ inputs.mT
        variance = solution.spread.variance(self.prior.whiten(solution.prior, inputs)[:num_targets])
        return mean, torch.cat([variance, mean.new_zeros(len(mean) - num_targets, inputs.shape[0])])

    def joint_covariance(self, solution: LaplacePosterior, inputs: Tensor) -> Tensor:
        """Returns ``Z C S C^T Z^T``, 0 for outputs that all tasks share; see ``HeadOfFunctions``."""
        num_outputs, num_targets = len(solution.mean), solution.support.y.shape[-1]
        found = solution.spread.covariance(self.prior.whiten(solution.prior, inputs.double())[:num_targets])
        return torch.cat([found, found.new_zeros(num_outputs - num_targets, *found.shape[1:])])

    def outer_loss(self, solution: LaplacePosterior, shared: Params, query: Batch) -> Tensor:
        """Returns the outer loss, mean over examples; see ``Head`` and ``outer``.

        ``marginal`` is Laplace's approximation for support and query set together, for which they are solved together.

        Raises:
            ValueError: If the likelihood is not known.

        Cost:
            For ``marginal``, that of ``solve`` for both sets.
        """
        loss, parameters = self._loss(shared)
        targets = query.y.double()
        if self.outer == "marginal":
            # In the precision of the features, by which it is judged what is converged.
            x = torch.cat([solution.support.x.to(query.x.dtype), query.x])
            both = Batch(x, torch.cat([solution.support.y, targets]))
            joint, _ = self.solve(solution.prior, shared, both, len(solution.mean))
            return (joint.nll / len(joint.support.y)).to(query.x.dtype)
        mean, variance = (each.mT for each in self.moments(solution, query.x))
        own = dict(zip(loss.likelihood.initial_parameters(), parameters, strict=True))
        if self.outer == "predictive_nll":
            prediction = loss.likelihood.predict(mean.unsqueeze(0), own, output_variance=variance.unsqueeze(0))
            found = prediction.nll(targets)
        else:
            found = expectation(
                lambda outputs: loss.likelihood.nll(outputs, targets.expand(len(outputs), -1, -1), own), mean, variance
            )
        return found.mean().to(query.x.dtype)

    def _loss(self, shared: Params) -> tuple[SeparableLoss, list[Tensor]]:
        """Returns the nll and the likelihood's parameters in float64."""
        if self.likelihood is None:
            raise ValueError(
                f"algorithm {self.name!r} has no likelihood: set one, such as likelihood=Poisson(), or adapt with a "
                "model, which has its own."
            )
        return SeparableLoss(self.likelihood), [shared[name].double() for name in self.likelihood.initial_parameters()]
