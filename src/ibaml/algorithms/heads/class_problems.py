"""The inner problem of a softmax head, whose classes its nll couples; see ``ibaml.algorithms.heads.softmax``."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ibaml.algorithms.heads.least_squares import cholesky_or_nan, inverse_of_factor, log_determinant, plus_identity
from ibaml.algorithms.heads.newton import Local, Problem, WhitenedWeights, each
from ibaml.algorithms.heads.room import require_room
from ibaml.types import Tensor

_MOST_AT_ONCE = 2**24
"""Numbers, 128 MB of them, that weighted features of examples that are summed at once may have."""


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


def solve_each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns ``matrix^-1 vector`` for each class; matrices are positive definite, and one may serve all."""
    root = inverse_of_factor(cholesky_or_nan(matrices))
    return each(root.mT, each(root, vectors))
