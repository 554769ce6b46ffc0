"""Newton's method for inner problems ``nll(f) + |e|^2 / 2`` with outputs ``f`` affine in whitened weights ``e``.

And the problem of a softmax head, whose classes its nll couples; see ``ibaml.algorithms.heads.softmax``.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


class Loss(Protocol):
    """The nll of a support set as a function of its outputs. All tensors may have leading axes."""

    def __call__(self, outputs: Tensor, targets: Tensor, /, *parameters: Tensor) -> Local:
        """Returns it and its derivatives at some outputs, which may have one leading axis more than targets have."""
        ...

    def start(self, problem: Any, offset: Tensor, targets: Tensor, /, *parameters: Tensor) -> Tensor:
        """Returns the unknowns to start from; arguments as of ``newton``."""
        ...


class CrossEntropy:
    """The cross entropy of classes, ``[num_classes, num_examples]``; its curvature is told by ``log p``."""

    def __call__(self, outputs: Tensor, targets: Tensor, /, *parameters: Tensor) -> Local:
        """See ``Loss``; there are no parameters."""
        del parameters
        log_probs = torch.log_softmax(outputs, -2)
        return Local(-(targets * log_probs).sum((-2, -1)), targets - log_probs.exp(), log_probs)

    def start(self, problem: "ClassProblem", offset: Tensor, targets: Tensor, /, *parameters: Tensor) -> Tensor:
        """Returns where the first step from zero weights leads, as if all classes were as likely there."""
        del parameters
        return problem.first_step(targets - torch.softmax(offset, -2))


class Problem(Protocol):
    """The inner problem in some unknowns ``x``, ``[num_classes, num_unknowns]``.

    All also take leading axes, the same for all tensors.
    """

    @property
    def squared_norms(self) -> Tensor:
        """Squared norms of the whitened features, ``[num_priors, num_examples]``."""
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

    def first_step(self, errors: Tensor, /) -> Tensor:
        """Returns the Newton step from zero weights where ``K`` classes are as likely.

            (I + X_c^T X_c / K)^-1 X_c^T (y_c - p_c)        X_c = Z C_c

        It takes one factorisation for each prior instead of one for each class.

        Args:
            errors: ``y - p``, ``[num_classes, num_examples]``.
        """
        ...

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

    def first_step(self, errors: Tensor) -> Tensor:
        return solve_each(plus_identity(self.products / errors.shape[-2]), errors)

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
        # E_c = D_c^1/2 (I + D_c^1/2 G_c D_c^1/2)^-1 D_c^1/2: eigenvalues of the matrix in brackets are at least 1.
        # The root of a probability that underflows has a derivative if it is taken of the logarithm.
        root = torch.exp(0.5 * log_probs)
        roots = root.unsqueeze(-1) * root.unsqueeze(-2)
        factor = cholesky_or_nan(plus_identity(roots * self.products))
        own = roots * torch.cholesky_inverse(factor)
        return factor, own, cholesky_or_nan(own.sum(-3))

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        own, total = factors
        outputs = self.outputs(right)
        # R^T E: matrices are symmetric.
        summed = own.flatten(-3, -2).mT @ outputs.flatten(-2).unsqueeze(-1)
        return right - each(own, outputs - torch.cholesky_solve(summed, total).mT)

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor) -> Tensor:
        """See ``ClassProblem``; factors may be those of ``in_products``."""
        # k(z, z) - k(z)^T Q k(z), where k(z) are inner products with the support set.
        each_own, total, *inverse = factors
        products = self.features @ whitened.mT
        explained = each_own @ products
        prior = (whitened**2).sum(-1)
        # No less than what rounding leaves of the prior's variance.
        own = torch.maximum(prior - (products * explained).sum(-2), torch.finfo(prior.dtype).eps * prior)
        between = inverse[0] @ explained if inverse else torch.linalg.solve_triangular(total, explained, upper=False)
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

    def first_step(self, errors: Tensor) -> Tensor:
        """See ``ClassProblem``."""
        matrix = plus_identity(self.features.mT @ self.features / errors.shape[-2])
        return solve_each(matrix, each(self.features.mT, errors))

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
    offset: Tensor,
    targets: Tensor,
    *parameters: Tensor,
    max_steps: int,
    tolerance: float,
    steps_per_matrix: int = 1,
    start: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns unknowns that solve a problem, the relative norm of the gradient, and factors of the Newton matrix.

    Args:
        problem: A ``Problem`` that is a NamedTuple of tensors. These, and all other tensors, are detached.
        loss: The nll.
        offset: Outputs at zero weights, ``[num_classes, num_examples]``.
        targets: Of the examples, likewise.
        *parameters: Those of the loss.
        max_steps: Newton matrices at most.
        tolerance: The step is the last whose length in the Newton matrix is at most so many roots of the inner loss.
        steps_per_matrix: Steps with one Newton matrix, unless they have to be shortened: each adds one to the order of
            convergence (Shamanskii's method), and is cheaper than further factors where these are of large matrices.
        start: Unknowns to start from. None: those of the loss.
    """
    settings = type(problem), loss, max_steps, tolerance, steps_per_matrix
    own = () if start is None else (start,)
    # ``apply`` takes .4 ms of its own, and there is nothing to hide where there is no transform.
    is_transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    solve = _Newton.apply if is_transformed else _Newton.forward
    return solve(*settings, len(own), *own, offset, targets, *problem, *parameters)


class _Newton(torch.autograd.Function):
    """Newton's method as one operation without a derivative, for all tasks at once under ``torch.func.vmap``.

    Not for a gradient: its arguments are detached, and the implicit function theorem needs none. But each of its some
    200 small operations would pass through each transform around it, which made a hypergradient twice as slow as it is,
    and under ``vmap``, where no step after convergence could be left out, ten times.
    """

    @staticmethod
    def forward(
        kind: Any,
        loss: Loss,
        max_steps: int,
        tolerance: float,
        steps_per_matrix: int,
        num_starts: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        start, (offset, targets, *leaves) = tensors[:num_starts], tensors[num_starts:]
        num_leaves = len(kind._fields)
        problem, parameters = kind(*leaves[:num_leaves]), leaves[num_leaves:]
        unknown = start[0] if start else loss.start(problem, offset, targets, *parameters)

        def nll(outputs: Tensor) -> Local:
            # Several step lengths are one more axis.
            base, known = (part if outputs.ndim == part.ndim else part.unsqueeze(-3) for part in (offset, targets))
            return loss(base + outputs, known, *parameters)

        point, factors = _solve(problem, nll, unknown, max_steps, tolerance, steps_per_matrix)
        return point.unknown, _relative_gradient(problem, point), *factors

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
        steps_per_matrix: int,
        num_starts: int,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[6:], strict=True)
        ]
        found = _Newton.apply(kind, loss, max_steps, tolerance, steps_per_matrix, num_starts, *batched)
        return found, (0,) * len(found)


class _Point(NamedTuple):
    """Where Newton's method is.

    Attributes:
        unknown: The unknowns.
        outputs: What they add to the outputs.
        local: The nll there.
        loss: The inner loss there, ``nll + |e|^2 / 2``.
    """

    unknown: Tensor
    outputs: Tensor
    local: Local
    loss: Tensor


def _solve(
    problem: Problem,
    nll: Callable[[Tensor], Local],
    start: Tensor,
    max_steps: int,
    tolerance: float,
    steps_per_matrix: int,
) -> tuple[_Point, tuple[Tensor, ...]]:
    """Returns the solution, and factors of the Newton matrix where the last step began; ``nll`` is that of outputs."""

    def at(unknown: Tensor, outputs: Tensor) -> _Point:
        local = nll(outputs)
        return _Point(unknown, outputs, local, local.total + 0.5 * problem.inner(unknown, unknown, outputs))

    def longest(point: _Point, step: Tensor, change: Tensor, decrement: Tensor) -> Tensor:
        """Returns the largest of some step lengths at which the inner loss has decreased; 0 if there is none."""
        lengths = 0.5 ** torch.arange(_NUM_HALVINGS, dtype=step.dtype, device=step.device)
        each_length = lengths[:, None, None]
        unknown = point.unknown.unsqueeze(-3) + each_length * step.unsqueeze(-3)
        found = at(unknown, point.outputs.unsqueeze(-3) + each_length * change.unsqueeze(-3))
        decreases = _decreases(point.loss.unsqueeze(-1), found.loss, lengths, decrement.unsqueeze(-1))
        return torch.where(decreases, lengths, 0.0).amax(-1)

    point, factors = at(start, problem.outputs(start)), ()
    for _ in range(max_steps):
        factors = problem.factorize(point.local.curvature)
        for index in range(steps_per_matrix):
            residual = problem.residual(point.unknown, point.local.errors)
            step = -problem.solve(factors, residual)
            change = problem.outputs(step)
            # Minus the slope; for the first step with a matrix it is the squared length in that matrix.
            decrement = -problem.inner(residual, step, change)
            # The step that is taken all the same leaves rounding alone, and so do further ones of other tasks.
            is_over = converged = decrement <= tolerance**2 * point.loss.abs()
            found = at(point.unknown + step, point.outputs + change)
            is_whole = tree.holds((converged | _decreases(point.loss, found.loss, 1.0, decrement)).all())
            if not is_whole:
                length = torch.where(converged, 1.0, longest(point, step, change, decrement))[..., None, None]
                found = at(point.unknown + length * step, point.outputs + length * change)
                # After a step of length 0 the next would be the same.
                is_over = converged | (length[..., 0, 0] == 0)
            point = found
            is_over = tree.holds(is_over.all())
            if is_over and not index:
                return point, factors
            # Far from the solution an old matrix is of little use.
            if is_over or not is_whole:
                break
    return point, factors


def _decreases(before: Tensor, after: Tensor, length: Tensor | float, decrement: Tensor) -> Tensor:
    """Whether a step brings its share of the decrease that the slope, of ``-decrement``, promises for its length."""
    # Near the solution a decrease is lost in rounding, and the whole step is right.
    rounding = 32 * torch.finfo(before.dtype).eps
    most = torch.add(before + rounding, before.abs(), alpha=rounding)
    return after <= most - _SUFFICIENT_DECREASE * length * decrement


def _relative_gradient(problem: Problem, point: _Point) -> Tensor:
    """Returns the norm of the gradient ``e - (Z C)^T errors`` over those of its terms, examples taken one by one."""
    both = torch.stack([problem.residual(point.unknown, point.local.errors), point.unknown])
    norm, of_prior = problem.inner(both, both, problem.outputs(both)).clamp_min(0).sqrt()
    of_examples = (point.local.errors**2 * problem.squared_norms).sum((-2, -1)).sqrt()
    return norm / (of_prior + of_examples + torch.finfo(norm.dtype).tiny)


def solve_each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns ``matrix^-1 vector`` for each class; matrices are positive definite, and one may serve all."""
    root = inverse_of_factor(cholesky_or_nan(matrices))
    return each(root.mT, each(root, vectors))


def each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns a matrix times a vector for each class; one matrix, or one vector, may serve all."""
    if matrices.shape[-3] == 1:
        return vectors @ matrices.squeeze(-3).mT
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
