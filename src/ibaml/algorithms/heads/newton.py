"""Newton's method for inner problems ``nll(f) + |e|^2 / 2`` with outputs ``f`` affine in whitened weights ``e``.

And the problem of a softmax head, whose classes its nll couples; see ``ibaml.algorithms.heads.softmax``.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from ibaml import tree
from ibaml.algorithms.heads.least_squares import cholesky_or_nan, inverse_of_factor, log_determinant, plus_identity
from ibaml.algorithms.heads.room import require_room
from ibaml.types import Tensor

_MOST_AT_ONCE = 2**24
"""Numbers, 128 MB of them, that weighted features of examples that are summed at once may have."""

_NUM_HALVINGS = 24
"""Step lengths that the line search chooses from: 1, 1/2, 1/4, ..."""

_SUFFICIENT_DECREASE = 1e-4
"""Share of the decrease that the slope promises which a step must bring (Armijo's rule)."""


class Local(NamedTuple):
    """The nll of the support set at some outputs, and its derivatives there.

    Attributes:
        total: Sum over examples and targets.
        errors: Minus its gradient in the outputs, ``[num_outputs, num_examples]``.
        curvature: What tells ``Problem.factorize`` of its second derivative, likewise.
    """

    total: Tensor
    errors: Tensor
    curvature: Tensor


Loss: TypeAlias = Callable[..., Local]
"""``(outputs, targets, *parameters) -> Local``; also with leading axes, which outputs may have one more of."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Local:
    """Returns the cross entropy of classes, ``[num_classes, num_examples]``; its curvature is told by ``log p``."""
    log_probs = torch.log_softmax(logits, -2)
    return Local(-(targets * log_probs).sum((-2, -1)), targets - log_probs.exp(), log_probs)


class Problem(Protocol):
    """The inner problem in some unknowns ``x``, ``[num_classes, num_unknowns]``.

    All also take leading axes, the same for all tensors.
    """

    @property
    def squared_norms(self) -> Tensor:
        """Squared norms of the whitened features, ``[num_priors, num_examples]``."""
        ...

    def start(self, targets: Tensor, /) -> Tensor:
        """Returns unknowns of zero for targets ``[num_classes, num_examples]``."""
        ...

    def outputs(self, unknown: Tensor, /) -> Tensor:
        """Returns what the unknowns add to the logits, ``[num_classes, num_examples]``."""
        ...

    def whitened(self, unknown: Tensor, /) -> Tensor:
        """Returns the whitened weights ``e``, ``[num_classes, rank]``."""
        ...

    def inner(self, one: Tensor, other: Tensor, outputs: Tensor, /) -> Tensor:
        """Returns the inner product of the whitened weights of two unknowns, given the other's ``outputs``."""
        ...

    def residual(self, unknown: Tensor, errors: Tensor, /) -> Tensor:
        """Returns the unknowns whose whitened weights are the gradient ``e_c - (Z C_c)^T (y_c - p_c)``.

        Args:
            unknown: Unknowns.
            errors: ``y - p``, ``[num_classes, num_examples]``.
        """
        ...

    def factorize(self, curvature: Tensor, /) -> tuple[Tensor, ...]:
        """Returns factors of the Newton matrix where the nll has some curvature, ``[num_classes, num_examples]``."""
        ...

    def solve(self, factors: Sequence[Tensor], right: Tensor, /) -> Tensor:
        """Returns minus the Newton step where the residual is ``right``."""
        ...


class ClassProblem(Problem, Protocol):
    """The inner problem of a softmax head."""

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor, /) -> Tensor:
        """Returns the covariance of logits, ``[num_queries, num_classes, num_classes]``.

        Args:
            factors: From ``factorize``.
            whitened: Whitened features of the queries, ``[num_priors, num_queries, rank]``.
        """
        ...

    def log_determinant(self, log_probs: Tensor, /) -> Tensor:
        """Returns the logarithm of the determinant of the Newton matrix, of the whitened weights of all classes."""
        ...


class _OfExamples(NamedTuple):
    """Unknowns are coefficients of the examples, ``e_c = (Z C_c)^T x_c``.

    The Newton matrix is ``I + W G``, with the inverse ``I - Q G``. For ``D_c = diag(p_c)``, ``E_c = (D_c^-1 + G_c)^-1``
    and ``R^T`` that sums over classes, ``Q = E - E R (R^T E R)^-1 R^T E`` (Rasmussen and Williams 2006, eq. (3.47)).

    Attributes:
        features: ``Z C``, ``[num_priors, num_examples, rank]``.
        products: ``G``, ``[num_priors, num_examples, num_examples]``.
    """

    features: Tensor
    products: Tensor

    @property
    def squared_norms(self) -> Tensor:
        return torch.diagonal(self.products, dim1=-2, dim2=-1)

    def start(self, targets: Tensor) -> Tensor:
        return torch.zeros_like(targets)

    def outputs(self, unknown: Tensor) -> Tensor:
        return each(self.products, unknown)

    def whitened(self, unknown: Tensor) -> Tensor:
        return each(self.features.mT, unknown)

    def inner(self, one: Tensor, other: Tensor, outputs: Tensor) -> Tensor:
        del other
        return (one * outputs).sum((-2, -1))

    def residual(self, unknown: Tensor, errors: Tensor) -> Tensor:
        return unknown - errors

    def factorize(self, log_probs: Tensor) -> tuple[Tensor, ...]:
        return self._factors(log_probs)[1:]

    def log_determinant(self, log_probs: Tensor) -> Tensor:
        """See ``ClassProblem``: ``|I + W G| = prod_c |I + D_c G_c| |R^T E R|``, as probabilities add up to 1."""
        factor, _, total = self._factors(log_probs)
        return log_determinant(factor).sum(-1) + log_determinant(total)

    def _factors(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # E_c = V_c^T V_c with V_c = L_c^-1 D_c^1/2 and L_c L_c^T = I + D_c^1/2 G_c D_c^1/2, whose eigenvalues are at
        # least 1. The root of a probability that underflows has a derivative if it is taken of the logarithm.
        root = torch.exp(0.5 * log_probs)
        factor = cholesky_or_nan(plus_identity(root.unsqueeze(-1) * self.products * root.unsqueeze(-2)))
        half = torch.linalg.solve_triangular(factor, torch.diag_embed(root), upper=False)
        stacked = half.flatten(-3, -2)
        return factor, half, cholesky_or_nan(stacked.mT @ stacked)

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        half, total = factors
        first = each(half.mT, each(half, self.outputs(right)))
        shift = torch.cholesky_solve(first.sum(-2).unsqueeze(-1), total).mT
        return right - first + each(half.mT, each(half, shift))

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor) -> Tensor:
        """See ``ClassProblem``; factors may be those of ``in_products``."""
        # k(z, z) - k(z)^T Q k(z), where k(z) are inner products with the support set.
        half, total, *inverse = factors
        explained = half @ (self.features @ whitened.mT)
        prior = (whitened**2).sum(-1)
        # No less than what rounding leaves of the prior's variance.
        own = torch.maximum(prior - (explained**2).sum(-2), torch.finfo(prior.dtype).eps * prior)
        summed = half.mT @ explained
        between = inverse[0] @ summed if inverse else torch.linalg.solve_triangular(total, summed, upper=False)
        return torch.diag_embed(own.mT) + torch.einsum("knm,jnm->mkj", between, between)


class WhitenedWeights(NamedTuple):
    """Unknowns are the whitened weights: what problems in these share, whatever their Newton matrix.

    Attributes:
        features: ``Z C``, ``[num_priors, num_examples, rank]``.
    """

    features: Tensor

    @property
    def squared_norms(self) -> Tensor:
        """See ``Problem``."""
        return (self.features**2).sum(-1)

    def start(self, targets: Tensor) -> Tensor:
        """See ``Problem``."""
        return targets.new_zeros(*targets.shape[:-1], self.features.shape[-1])

    def outputs(self, unknown: Tensor) -> Tensor:
        """See ``Problem``."""
        return each(self.features, unknown)

    def whitened(self, unknown: Tensor) -> Tensor:
        """See ``Problem``."""
        return unknown

    def inner(self, one: Tensor, other: Tensor, outputs: Tensor) -> Tensor:
        """See ``Problem``."""
        del outputs
        return (one * other).sum((-2, -1))

    def residual(self, unknown: Tensor, errors: Tensor) -> Tensor:
        """See ``Problem``."""
        return unknown - each(self.features.mT, errors)


class _OfWeights(WhitenedWeights):
    """The Newton matrix is the Hessian of the inner loss in the weights of all classes together."""

    __slots__ = ()

    def factorize(self, log_probs: Tensor) -> tuple[Tensor, ...]:
        # H = I + blockdiag((Z C_c)^T D_c (Z C_c)) - V^T V with V = [D_1 (Z C_1), ...], by parts of the examples.
        size = max(1, _MOST_AT_ONCE // (log_probs.shape[-2] * self.features.shape[-1]))
        parts = zip(log_probs.split(size, -1), self.features.split(size, -2), strict=True)
        hessian = functools.reduce(torch.Tensor.add_, itertools.starmap(_curvature, parts))
        hessian.diagonal(dim1=-2, dim2=-1).add_(1)
        return (cholesky_or_nan(hessian),)

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.flatten(-2).unsqueeze(-1), factors[0]).squeeze(-1).reshape(right.shape)

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor) -> Tensor:
        """See ``ClassProblem``; factors may be those of ``in_products``."""
        factor, *known = factors
        inverse = known[0] if known else inverse_of_factor(factor)
        along = inverse.unflatten(-1, (-1, whitened.shape[-1])).movedim(-2, 0) @ whitened.mT
        return torch.einsum("kim,jim->mkj", along, along)

    def log_determinant(self, log_probs: Tensor) -> Tensor:
        """See ``ClassProblem``."""
        return log_determinant(self.factorize(log_probs)[0])


def _curvature(log_probs: Tensor, features: Tensor) -> Tensor:
    """Returns the Hessian of the nll of some examples in the weights of all classes; no second matrix of its size."""
    weighted = log_probs.exp().unsqueeze(-1) * features
    columns = weighted.movedim(-3, -2).flatten(-2)
    hessian = -columns.mT @ columns
    num_classes, rank = weighted.shape[-3], weighted.shape[-1]
    blocks = hessian.unflatten(-1, (num_classes, rank)).unflatten(-3, (num_classes, rank))
    blocks.diagonal(dim1=-4, dim2=-2).add_((weighted.mT @ features).movedim(-3, -1))
    return hessian


def in_products(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns factors of a Newton matrix with the inverse of the last one beside them; see ``Head.in_products``."""
    return *factors, inverse_of_factor(factors[-1])


def problem_of(features: Tensor, num_classes: int) -> ClassProblem:
    """Returns the problem in the unknowns that cost less; ``features`` are ``[num_priors, num_examples, rank]``."""
    num_examples, rank = features.shape[-2:]
    in_weights = _costs_less_in_weights(num_examples, rank, num_classes)
    # A matrix, its factor and, for covariances, the inverse of that.
    matrix = (num_classes * rank) ** 2 if in_weights else num_classes * num_examples**2
    require_room(features, 3 * matrix, num_classes=num_classes, num_examples=num_examples)
    if in_weights:
        return _OfWeights(features)
    return _OfExamples(features, features @ features.mT)


def _costs_less_in_weights(num_examples: int, rank: int, num_classes: int) -> bool:
    num_weights = num_classes * rank
    return num_weights**2 * (num_weights + 3 * num_examples) < (num_classes + 1) * num_examples**3


def newton(
    problem: Any,
    loss: Loss,
    start: Tensor,
    offset: Tensor,
    targets: Tensor,
    *parameters: Tensor,
    max_steps: int,
    tolerance: float,
) -> tuple[Tensor, ...]:
    """Returns unknowns that solve a problem, the relative norm of the gradient, and factors of the Newton matrix.

    Args:
        problem: A ``Problem`` that is a NamedTuple of tensors. These, and all other tensors, are detached.
        loss: The nll.
        start: Unknowns to start from.
        offset: Outputs at zero weights, ``[num_classes, num_examples]``.
        targets: Of the examples, likewise.
        *parameters: Those of the loss.
        max_steps: Newton steps at most.
        tolerance: The step is the last whose length in the Newton matrix is at most so many roots of the inner loss.
    """
    return _Newton.apply(type(problem), loss, max_steps, tolerance, start, offset, targets, *problem, *parameters)


class _Newton(torch.autograd.Function):
    """Newton's method as one operation without a derivative, for all tasks at once under ``torch.func.vmap``.

    Not for a gradient: its arguments are detached, and the implicit function theorem needs none. But each of its some
    300 small operations would pass through each transform around it, which made a hypergradient twice as slow as it is,
    and under ``vmap``, where no step after convergence could be left out, ten times.
    """

    @staticmethod
    def forward(
        kind: Any,
        loss: Loss,
        max_steps: int,
        tolerance: float,
        start: Tensor,
        offset: Tensor,
        targets: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        num_leaves = len(kind._fields)
        problem, parameters = kind(*leaves[:num_leaves]), leaves[num_leaves:]

        def at(outputs: Tensor, targets: Tensor) -> Local:
            return loss(outputs, targets, *parameters)

        unknown, factors = _solve(problem, at, start, offset, targets, max_steps, tolerance)
        errors = at(offset + problem.outputs(unknown), targets).errors
        return unknown, _relative_gradient(problem, unknown, problem.residual(unknown, errors), errors), *factors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any,
        in_dims: tuple[int | None, ...],
        kind: Any,
        loss: Loss,
        max_steps: int,
        tolerance: float,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[4:], strict=True)
        ]
        found = _Newton.apply(kind, loss, max_steps, tolerance, *batched)
        return found, (0,) * len(found)


def _solve(
    problem: Problem, loss: Loss, start: Tensor, offset: Tensor, targets: Tensor, max_steps: int, tolerance: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the solution and the Newton matrix of the last step."""
    unknown, factors = start, ()
    outputs = offset + problem.outputs(start)
    local = loss(outputs, targets)
    for _ in range(max_steps):
        residual = problem.residual(unknown, local.errors)
        factors = problem.factorize(local.curvature)
        step = -problem.solve(factors, residual)
        change = problem.outputs(step)
        line = _Line(
            nll=local.total,
            squared_norm=problem.inner(unknown, unknown, outputs - offset),
            along=problem.inner(unknown, step, change),
            squared_step=problem.inner(step, step, change),
            decrement=-problem.inner(residual, step, change),
        )
        # The step that is taken all the same leaves rounding alone, and so do further ones while other tasks go on.
        converged = line.decrement <= tolerance**2 * line.loss.abs()
        if tree.holds(converged.all()):
            return unknown + step, factors
        local = loss(outputs + change, targets)
        whole = converged | line.decreases(1.0, local.total)
        if not tree.holds(whole.all()):
            length = torch.where(converged, 1.0, _step_length(line, loss, outputs, change, targets))
            # After a step of length 0 the next would be the same.
            if tree.holds((converged | (length == 0)).all()):
                return unknown + length[..., None, None] * step, factors
            step, change = (length[..., None, None] * each for each in (step, change))
            local = loss(outputs + change, targets)
        unknown, outputs = unknown + step, outputs + change
    return unknown, factors


class _Line(NamedTuple):
    """The inner loss ``nll + |e|^2 / 2`` along a Newton step; all are scalars.

    Attributes:
        nll: That of the start.
        squared_norm: ``|e|^2`` of the start.
        along: Inner product of start and step.
        squared_step: That of the step with itself.
        decrement: Minus the slope, which is the squared length of the step in the Newton matrix: twice the decrease
            that the quadratic model of the inner loss promises.
    """

    nll: Tensor
    squared_norm: Tensor
    along: Tensor
    squared_step: Tensor
    decrement: Tensor

    @property
    def loss(self) -> Tensor:
        """The inner loss of the start."""
        return self.nll + 0.5 * self.squared_norm

    def decreases(self, length: Tensor | float, nll: Tensor) -> Tensor:
        """Whether a step of some length brings its share of the promised decrease.

        Args:
            length: The length.
            nll: Where that step ends.
        """
        decrease = self.nll - nll - length * (self.along + 0.5 * length * self.squared_step)
        # Near the solution a decrease is lost in rounding, and the whole step is right.
        rounding = 32 * torch.finfo(decrease.dtype).eps * (1 + self.loss.abs())
        return decrease >= _SUFFICIENT_DECREASE * length * self.decrement - rounding


def _step_length(line: _Line, loss: Loss, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
    """Returns the largest of some step lengths at which the inner loss has decreased; 0 if there is none."""
    lengths = 0.5 ** torch.arange(_NUM_HALVINGS, dtype=change.dtype, device=change.device)
    at = outputs.unsqueeze(-3) + lengths[:, None, None] * change.unsqueeze(-3)
    nll = loss(at, targets.unsqueeze(-3)).total
    decreases = _Line(*(each.unsqueeze(-1) for each in line)).decreases(lengths, nll)
    return torch.where(decreases, lengths, 0.0).amax(-1)


def _relative_gradient(problem: Problem, unknown: Tensor, residual: Tensor, errors: Tensor) -> Tensor:
    """Returns the norm of the gradient ``e - (Z C)^T errors`` over those of its terms, examples taken one by one."""
    both = torch.stack([residual, unknown])
    norm, of_prior = problem.inner(both, both, problem.outputs(both)).clamp_min(0).sqrt()
    of_examples = (errors**2 * problem.squared_norms).sum((-2, -1)).sqrt()
    return norm / (of_prior + of_examples + torch.finfo(norm.dtype).tiny)


def each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns a matrix times a vector for each class; one matrix, or one vector, may serve all."""
    if matrices.shape[-3] == 1:
        return vectors @ matrices.squeeze(-3).mT
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
