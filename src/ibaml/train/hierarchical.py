"""Hierarchical linear models of whole tables of groups: hyper-parameters by restricted marginal likelihood.

Each group ``t`` has rows with features ``Z`` and targets ``y = Z (m + C u) + noise``, ``u ~ N(0, I)``, noise of
variance ``s2``, so that ``y ~ N(Z m, V)`` with ``V = Z C C^T Z^T + s2 I``. The common weights have a prior, all but
flat, ``m ~ N(0, P^-1)`` and are integrated out, as restricted maximum likelihood does (Patterson and Thompson 1971):

    A = P + sum_t Z^T V^-1 Z    b = sum_t Z^T V^-1 y    m | all ~ N(A^-1 b, A^-1)
    -2 log p(all) = sum_t (log |2 pi V| + y^T V^-1 y) + log |A| - log |P| - b^T A^-1 b

A new group then has the weights ``N(A^-1 b, C C^T + A^-1)``: with few groups their mean is uncertain, which a plug-in
of the estimate leaves out. With ``G = Z^T Z``, ``g = Z^T y`` and the Cholesky factor ``L`` of ``I + C^T G C / s2``

    Z^T V^-1 Z = G / s2 - U^T U ,  U = L^-1 C^T G / s2        log |V| = 2 log |L| + num_rows log s2

so that a step costs no more than a factorisation for each group in as many dimensions as there are features. There are
few hyper-parameters: L-BFGS in float64 needs some dozens of such steps where stochastic gradients take hundreds. Of
several targets each counts with the rows in which it was measured.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ibaml.algorithms.heads.least_squares import cholesky_or_nan, log_determinant, plus_identity
from ibaml.types import Batch, Params, Tensor

_FLAT = 1e-4
"""Precision of the common weights of inputs and constant, at targets of unit variance."""


class Groups(NamedTuple):
    """Rows of several groups, filled up with rows that do not count. All float64.

    Attributes:
        x: Inputs, ``[num_groups, num_rows, num_inputs]``.
        y: Targets, ``[num_groups, num_rows, num_targets]``; zero where they do not count.
        measured: 1 where a target counts, else 0, ``[num_masks, num_groups, num_rows]``; one mask serves all targets
            if all are measured in every row that counts, else each has its own.
    """

    x: Tensor
    y: Tensor
    measured: Tensor

    @property
    def present(self) -> Tensor:
        """1 for rows that count, else 0, ``[num_groups, num_rows]``."""
        return self.measured.amax(0)

    def of(self, index: Tensor) -> "Groups":
        """Returns some of the groups."""
        return Groups(self.x[index], self.y[index], self.measured[:, index])


def in_one(groups: list[Batch]) -> Groups:
    """Returns groups of unequal size as one record.

    Args:
        groups: Inputs ``[num_rows, *input_shape]`` and real targets ``[num_rows, num_targets]`` of each, NaN where
            they were not measured.
    """
    counts = torch.tensor([len(group.y) for group in groups])
    present = (torch.arange(int(counts.max())) < counts.unsqueeze(1)).double()
    x, y = (
        torch.nn.utils.rnn.pad_sequence([part.flatten(1).double() for part in parts], batch_first=True)
        for parts in zip(*groups, strict=True)
    )
    if not bool((missing := y.isnan()).any()):
        return Groups(x, y, present.unsqueeze(0))
    return Groups(x, y.masked_fill(missing, 0), (present.unsqueeze(-1) * ~missing).movedim(-1, 0))


class Moments(NamedTuple):
    """What the likelihood knows of each group, sums over its rows; ``num_masks`` as in ``Groups``.

    Attributes:
        gram: ``Z^T Z``, ``[num_masks, num_groups, num_features, num_features]``.
        cross: ``Z^T y``, ``[num_targets, num_groups, num_features]``.
        square: ``y^T y``, ``[num_targets, num_groups]``.
        num_rows: Number of rows, ``[num_masks, num_groups]``.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    num_rows: Tensor


def moments(features: Tensor, groups: Groups) -> Moments:
    """Returns the moments of groups.

    Args:
        features: ``Z``, ``[num_groups, num_rows, num_features]``.
        groups: Their targets, and which rows count.
    """
    counted = features * groups.measured.unsqueeze(-1)
    # Targets that do not count are zero.
    cross = (features.mT @ groups.y).movedim(-1, 0)
    return Moments(counted.mT @ counted, cross, (groups.y**2).sum(1).T, groups.measured.sum(-1))


class Restricted(NamedTuple):
    """The restricted likelihood at some hyper-parameters, for each target. Leading axes: targets, groups.

    Attributes:
        nll: Minus its logarithm, summed over targets, a scalar.
        of_mean: ``Z^T V^-1 Z`` of each group, ``[num_targets, num_groups, num_features, num_features]``.
        of_target: ``Z^T V^-1 y`` of each group, ``[num_targets, num_groups, num_features]``.
        precision: ``P``, ``[num_targets, num_features]``.
        num_groups: In how many groups a target was measured, ``[num_masks]``.
    """

    nll: Tensor
    of_mean: Tensor
    of_target: Tensor
    precision: Tensor
    num_groups: Tensor

    def common_weights(self) -> tuple[Tensor, Tensor]:
        """Returns mean and covariance of ``m`` given all groups, ``[num_targets, num_features(, num_features)]``."""
        return _weights(self._prior + self.of_mean.sum(1), self.of_target.sum(1))

    def common_weights_without_each(self) -> tuple[Tensor, Tensor]:
        """Returns the same given all groups but one, for each that is left out, ``[num_targets, num_groups, ...]``."""
        all_of_mean, all_of_target = (part.sum(1, keepdim=True) for part in (self.of_mean, self.of_target))
        return _weights(self._prior.unsqueeze(1) + all_of_mean - self.of_mean, all_of_target - self.of_target)

    @property
    def _prior(self) -> Tensor:
        return torch.diag_embed(self.precision)


def _weights(precision: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    factor = cholesky_or_nan(precision)
    mean = torch.cholesky_solve(cross.unsqueeze(-1), factor).squeeze(-1)
    return mean, torch.cholesky_inverse(factor)


def restricted(factor: Tensor, log_noise: Tensor, precision: Tensor, of: Moments) -> Restricted:
    """Returns the restricted likelihood of groups.

    Args:
        factor: ``C``, ``[num_targets, num_features, num_features]``.
        log_noise: ``log s2``, ``[num_targets]``.
        precision: Diagonal of ``P``, ``[num_targets, num_features]``.
        of: Moments of the groups.

    Cost:
        ``num_features^3`` operations for each group and target.
    """
    noise = torch.exp(log_noise)[:, None, None, None]
    whitened = factor.mT.unsqueeze(1) @ of.gram
    inner = cholesky_or_nan(plus_identity(whitened @ factor.unsqueeze(1) / noise))
    right = torch.cat([whitened, factor.mT.unsqueeze(1) @ of.cross.unsqueeze(-1)], -1)
    reduced = torch.linalg.solve_triangular(inner, right, upper=False) / noise
    by_mean, by_target = reduced[..., :-1], reduced[..., -1:]
    of_mean = of.gram / noise - by_mean.mT @ by_mean
    of_target = of.cross / noise[..., 0] - (by_mean.mT @ by_target).squeeze(-1)
    squares = of.square / noise[..., 0, 0] - (by_target**2).sum((-2, -1))
    log_volume = log_determinant(inner) + of.num_rows * (log_noise.unsqueeze(-1) + math.log(2 * math.pi))
    total = cholesky_or_nan(torch.diag_embed(precision) + of_mean.sum(1))
    known = torch.linalg.solve_triangular(total, of_target.sum(1).unsqueeze(-1), upper=False)
    common = log_determinant(total) - torch.log(precision).sum(-1) - (known**2).sum((-2, -1))
    nll = 0.5 * ((squares + log_volume).sum(1) + common).sum()
    return Restricted(nll, of_mean, of_target, precision, (of.num_rows > 0).sum(-1))


def restricted_nll(
    factor: Tensor,
    log_noise: Tensor,
    precision: Tensor,
    of: Moments,
    features: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Returns the value of ``restricted`` with derivatives in closed form, in half the time of autograd.

    With ``S = C C^T``, ``m = A^-1 b``, ``r = y - Z m``, and of each group ``A_t = Z^T V^-1 Z`` and ``q = Z^T V^-1 r``,
    what multiplies a change of ``V`` is ``K = V^-1 - V^-1 r r^T V^-1 - V^-1 Z A^-1 Z^T V^-1``, half of it, so that

        d nll / dS = 1/2 sum_t (A_t - q q^T - A_t A^-1 A_t)     d nll / ds2 = 1/2 sum_t trace K
        d nll / dP = 1/2 (diag(A^-1) + m^2 - 1/P)               d nll / dZ = K Z S + V^-1 Z A^-1 - V^-1 r m^T

    where ``V^-1 Z = Z (I - S A_t) / s2`` and ``V^-1 r = (r - Z S q) / s2``.

    Args:
        factor: As in ``restricted``, as are the next three.
        log_noise: As there.
        precision: As there.
        of: As there.
        features: ``Z``, if they are to be differentiated.
        groups: The rows, then.

    Returns:
        A scalar that has first derivatives only.
    """
    with torch.no_grad():
        found = restricted(factor, log_noise, precision, of)
        mean, inverse = (part.unsqueeze(1) for part in found.common_weights())
        noise = torch.exp(log_noise)[:, None, None, None]
        among = (factor @ factor.mT).unsqueeze(1)
        score = found.of_target - (found.of_mean @ mean.unsqueeze(-1)).squeeze(-1)
        known = found.of_mean @ inverse
        by_among = found.of_mean - score.unsqueeze(-1) * score.unsqueeze(-2) - known @ found.of_mean
        by_factor = (by_among.sum(1) @ factor).tril()
        # r^T V^-1 r, by what is known of y^T V^-1 y.
        squares = (_square(of, found, noise, among) - (mean * (found.of_target + score)).sum(-1)).sum(1)
        spread = among @ found.of_mean
        trace = (of.num_rows - torch.diagonal(spread, dim1=-2, dim2=-1).sum(-1)).sum(1)
        fitted = ((score.unsqueeze(-2) @ among).squeeze(-2) * score).sum((1, 2))
        of_mean = (known * plus_identity(-spread)).sum((1, 2, 3))
        by_log_noise = 0.5 * (trace - (squares - fitted) - of_mean)
        by_precision = 0.5 * (torch.diagonal(inverse[:, 0], dim1=-2, dim2=-1) + mean[:, 0] ** 2 - 1 / precision)
    total = found.nll
    changes = [(factor, by_factor), (log_noise, by_log_noise), (precision, by_precision)]
    if features is not None and groups is not None:
        with torch.no_grad():
            z = features * groups.measured.unsqueeze(-1)
            error = groups.y.movedim(-1, 0) - (z @ mean.unsqueeze(-1)).squeeze(-1)
            by_mean = z @ plus_identity(-spread) / noise
            by_error = (error.unsqueeze(-1) - z @ (among @ score.unsqueeze(-1))) / noise
            inner = by_mean @ plus_identity(-known.mT) - by_error * score.unsqueeze(-2)
            by_features = inner @ among + by_mean @ inverse - by_error * mean.unsqueeze(-2)
            by_features = (by_features * groups.measured.unsqueeze(-1)).sum(0)
        changes.append((features, by_features))
    for value, slope in changes:
        total = total + (slope * (value - value.detach())).sum()
    return total


def _square(of: Moments, found: Restricted, noise: Tensor, among: Tensor) -> Tensor:
    """Returns ``y^T V^-1 y`` of each group: ``(y^T y - g^T S Z^T V^-1 y) / s2``."""
    explained = ((among @ found.of_target.unsqueeze(-1)).squeeze(-1) * of.cross).sum(-1)
    return (of.square - explained) / noise[..., 0, 0]


def flat_precision(num_targets: int, num_weights: int) -> Tensor:
    """Returns the precision of common weights that next to nothing is known of beforehand."""
    return torch.full((num_targets, num_weights), _FLAT, dtype=torch.float64)


class Minimum(NamedTuple):
    """Where a function is least.

    Attributes:
        parameters: The point.
        value: The function there.
        num_steps: Steps that were taken.
        is_late: Whether the time ended the search.
    """

    parameters: Params
    value: float
    num_steps: int
    is_late: bool = False


def minimise(
    function: Callable[[Params], Tensor], start: Params, *, most_steps: int, deadline: float | None = None
) -> Minimum:
    """Minimises a function by L-BFGS in float64; a point where it is not finite ends a line search early.

    Args:
        function: Scalar function of parameters.
        start: Where to start, float64.
        most_steps: Number of steps at the most.
        deadline: No step begins after it, by ``time.monotonic``; the best point so far is returned. None: no limit.
    """
    from scipy.optimize import minimize  # half a second, for those who fit only

    names, values = list(start), list(start.values())

    def unravel(flat: Tensor) -> Params:
        parts = flat.split([value.numel() for value in values])
        return {name: part.view_as(value) for name, part, value in zip(names, parts, values, strict=True)}

    def evaluate(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        flat = torch.from_numpy(point).clone().requires_grad_()
        with torch.enable_grad():
            value = function(unravel(flat))
            (gradient,) = torch.autograd.grad(value, flat)
        if not bool(torch.isfinite(value) & torch.isfinite(gradient).all()):
            return _WALL, np.zeros_like(point)
        return float(value.detach()), gradient.numpy()

    first = torch.cat([value.detach().flatten() for value in values]).numpy()
    size = max(1.0, abs(evaluate(first)[0]))
    options = {"maxiter": most_steps, "maxcor": 20, "ftol": _TOLERANCE / size, "gtol": 1e-3}

    def is_late() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def stop_when_late(intermediate_result: object) -> None:
        del intermediate_result
        if is_late():
            raise StopIteration

    if is_late():
        return Minimum(unravel(torch.from_numpy(first)), size, 0, is_late=True)
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", options=options, callback=stop_when_late)
    # Of scipy's codes of how a search ends, 99 is that of the callback.
    return Minimum(unravel(torch.from_numpy(found.x)), float(found.fun), int(found.nit), found.status == 99)


def wider(degrees_of_freedom: int) -> float:
    """Returns the variance of the Gaussian with as wide a central 90% interval as a Student t of scale one.

    Examples:
        >>> round(wider(9), 3), round(wider(1000), 3)
        (1.242, 1.002)
    """
    from scipy.special import ndtri, stdtrit  # for those who fit only

    return float(stdtrit(max(degrees_of_freedom, 1), 0.95) / ndtri(0.95)) ** 2


_WALL = 1e12
_TOLERANCE = 0.01
"""In nats: a step that gains less is the last. Hyper-parameters are uncertain by about one."""


def query_nll(
    mean: Tensor, covariance: Tensor, log_noise: Tensor, support: tuple[Tensor, Groups], query: tuple[Tensor, Groups]
) -> Tensor:
    """Returns the nll of each group's query rows given its support rows, mean over rows, sum over measured targets.

    Args:
        mean: Means of a new group's weights, ``[num_targets, num_groups or 1, num_features]``.
        covariance: Covariances, ``[num_targets, num_groups or 1, num_features, num_features]``.
        log_noise: ``log s2``, ``[num_targets]``.
        support: Features of the support rows, ``[num_groups, num_rows, num_features]``, and the rows.
        query: Likewise.

    Returns:
        ``[num_groups]``.
    """
    (known, of_known), (asked, of_asked) = support, query
    # Rows of zeros have noise alone and say nothing.
    known = known * of_known.measured.unsqueeze(-1)
    noise = torch.exp(log_noise)[:, None, None]
    projected = covariance @ known.mT
    factor = cholesky_or_nan(known @ projected + torch.diag_embed(noise.expand(-1, 1, known.shape[-2])))
    error = of_known.y.movedim(-1, 0) - (known @ mean.unsqueeze(-1)).squeeze(-1)
    right = torch.cat([(asked @ projected).mT, error.unsqueeze(-1)], -1)
    right = torch.linalg.solve_triangular(factor, right, upper=False)
    gain, whitened = right[..., :-1], right[..., -1:]
    centre = (asked @ mean.unsqueeze(-1) + gain.mT @ whitened).squeeze(-1)
    variance = ((asked @ covariance) * asked).sum(-1) - (gain**2).sum(-2) + noise
    square = (of_asked.y.movedim(-1, 0) - centre) ** 2 / variance
    each = 0.5 * (square + torch.log(2 * math.pi * variance)) * of_asked.measured
    return each.sum((0, -1)) / of_asked.present.sum(-1)
