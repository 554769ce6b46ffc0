"""Newton's method for inner problems ``nll(f) + |e|^2 / 2`` with outputs ``f`` affine in whitened weights ``e``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ibaml import tree
from ibaml.types import Tensor

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


def each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns a matrix times a vector for each class; one matrix, or one vector, may serve all."""
    if matrices.shape[-3] == 1:
        return vectors @ matrices.squeeze(-3).mT
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
