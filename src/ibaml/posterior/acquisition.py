"""Which rows of a task to measure next: what a measurement would tell, before it is made.

For numbers with a Gaussian posterior over functions, a measurement at row ``j`` with noise of variance ``s2`` changes
the covariance ``K`` of the functions' values, whatever its outcome, to ``K - K_:j K_j: / (K_jj + s2)``. The variance at
row ``i`` so falls by ``K_ij^2 / (K_jj + s2)``, exactly; the noise of predictions stays (MacKay 1992, "Information-based
objective functions for active data selection"; Cohn 1996). For classes it is the mutual information between the label
and the weights, ``H[E p(y | w)] - E H[p(y | w)]`` (Lindley 1956; Houlsby et al. 2011, "BALD"), in nats.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ibaml.algorithms.heads import GaussianClasses
from ibaml.algorithms.heads.gaussian import JointMoments
from ibaml.likelihoods import ClassPrediction
from ibaml.optional import require
from ibaml.seeds import noise_generator
from ibaml.types import Tensor

if TYPE_CHECKING:
    from ibaml.posterior.fitted import FittedModel

_MOST_ROWS = 4_000
"""Rows whose joint covariance is held at once: 128 MB for each target."""


class Choice(NamedTuple):
    """Rows that were chosen among candidates.

    Attributes:
        positions: Which of the candidates, best first, ``[num]``.
        gains: What each adds to those before it, ``[num]``.
        scores: What each candidate would give by itself, ``[num_candidates]``.
    """

    positions: Tensor
    gains: Tensor
    scores: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Acquisition:
    """The rows to measure next, and what each candidate would tell; numpy arrays for arrays, tensors for tensors.

    Attributes:
        positions: Which of the candidates to measure, best first, ``[num]``: ``candidates.iloc[positions]`` of a table.
        gains: What each of these is expected to add to those before it, ``[num]``; for a pandas table a Series with
            the labels of its rows.
        scores: What each candidate would give by itself, ``[num_candidates]``; likewise.
    """

    positions: Any
    gains: Any
    scores: Any


def acquire(fitted: "FittedModel", posterior: Any, candidates: Tensor, of: Tensor | None, num: int) -> Choice:
    """Chooses rows; see ``TaskPosterior.acquisition``.

    Args:
        fitted: The fitted model.
        posterior: What the algorithm's ``adapt`` returned.
        candidates: Encoded inputs.
        of: Encoded inputs of the rows to be predicted. None: the candidates.
        num: Rows to choose.

    Raises:
        ValueError: If the model cannot tell what a measurement would add, or the numbers of rows are out of range.
    """
    algorithm = fitted.algorithm
    if not 1 <= num <= len(candidates):
        raise ValueError(f"num is {num}; expected at least 1 and at most the {len(candidates)} candidates.")
    if not algorithm.is_bayesian:
        raise ValueError(
            f"algorithm {algorithm.name!r} has no posterior, so that it does not tell what a measurement would add: "
            "use one that has, such as algorithm='head'."
        )
    if fitted.model.likelihood.target_kind == "classes":
        if of is not None:
            raise ValueError(
                "of names rows whose variance is to fall, but the model is of classes, whose candidates are judged by "
                "what their labels tell of the weights: leave it out."
            )
        return _by_information(fitted, posterior, candidates, num)
    rows = candidates if of is None else torch.cat([candidates, of])
    if len(rows) > _MOST_ROWS:
        raise ValueError(
            f"candidates and of have {len(rows)} rows, whose joint covariance is needed; expected at most "
            f"{_MOST_ROWS}: take a random part of them."
        )
    if not fitted.gaussian_head.is_sequential:
        raise ValueError(
            f"algorithm {algorithm.name!r}, as it is set, takes all examples to learn from a further one, so that its "
            "posterior does not tell what a measurement would add: use covariance='full' and centre=False."
        )
    with torch.no_grad():
        moments = fitted.joint_moments(posterior, rows)
        if len(moments.noise) > 1 and fitted.preprocessing is not None and fitted.preprocessing.targets is not None:
            # Targets may have different units: each counts in that of its spread over training.
            scale = fitted.preprocessing.targets.scale.to(rows.device).expand(len(moments.noise))
            moments = moments.rescaled(torch.zeros_like(scale), 1 / scale)
    # At another temperature than that of Bayes' rule, adaptation takes the noise for larger or smaller.
    moments = moments._replace(noise=(algorithm.temperature or 1.0) * moments.noise)
    return by_variance(moments, len(candidates), num)


def by_variance(moments: JointMoments, num_candidates: int, num: int) -> Choice:
    """Chooses rows one after the other, each of which lowers the variance most, given those before it.

    The gains of several rows add up to what they bring together, exactly. That no other set brings more is not said:
    the greedy choice is the best for one row, and in practice close for several.

    Args:
        moments: Of the candidates, and after them of the rows whose variance is to fall; if there are none, of the
            candidates alone, which are then those too.
        num_candidates: Number of candidates.
        num: Rows to choose.

    Returns:
        The choice; gains and scores are the mean reduction over the rows, summed over targets.

    Cost:
        ``num num_rows^2`` operations for each target.
    """
    covariance, noise = moments.covariance, moments.noise.unsqueeze(-1)
    first_target = num_candidates if covariance.shape[-1] > num_candidates else 0
    is_open = torch.ones(num_candidates, dtype=torch.bool, device=covariance.device)
    # Below that a variance is rounding: without noise nothing is left to learn where all is known.
    before = torch.diagonal(covariance, dim1=-2, dim2=-1)[:, :num_candidates]
    limits = torch.finfo(before.dtype)
    least = limits.eps**0.75 * before + limits.tiny
    positions: list[int] = []
    rounds: list[Tensor] = []
    while True:
        own = torch.maximum(torch.diagonal(covariance, dim1=-2, dim2=-1)[:, :num_candidates] + noise, least)
        rounds.append(((covariance[:, first_target:, :num_candidates] ** 2).mean(-2) / own).sum(0))
        best = int(torch.where(is_open, rounds[-1], -math.inf).argmax())
        positions.append(best)
        if len(positions) == num:
            break
        is_open[best] = False
        column = covariance[:, :, best] / own[:, best, None].sqrt()
        covariance = covariance - column.unsqueeze(-1) * column.unsqueeze(-2)
    gains = torch.stack([scores[position] for scores, position in zip(rounds, positions, strict=True)])
    return Choice(torch.tensor(positions, device=gains.device), gains, rounds[0])


def _by_information(fitted: "FittedModel", posterior: Any, candidates: Tensor, num: int) -> Choice:
    if isinstance(fitted.algorithm, GaussianClasses):
        with torch.no_grad():
            inputs = fitted.algorithm.inputs(fitted.model, fitted.meta.shared, posterior, candidates)
            generator = noise_generator("prediction", 0)
            scores = fitted.algorithm.label_information(posterior.solution, inputs, generator=generator)
    else:
        prediction = fitted.predict(posterior, candidates, seed=0)
        assert isinstance(prediction, ClassPrediction)
        if len(prediction.sample_log_probs) == 1:
            raise ValueError(
                f"algorithm {fitted.algorithm.name!r}, as it is set, predicts from one point of its posterior, so that "
                "what a label would tell is not known: give it a positive posterior_temperature, or several "
                "num_evaluation_samples."
            )
        scores = prediction.tempered(1 / prediction.temperature).epistemic
    gains, positions = scores.sort(descending=True, stable=True)
    return Choice(positions[:num], gains[:num], scores)


def in_terms_of(choice: Choice, candidates: Any) -> Acquisition:
    """Returns a choice as what the candidates came as: tensors, arrays, or Series with the labels of their rows."""
    if isinstance(candidates, torch.Tensor):
        return Acquisition(*choice)
    positions, gains, scores = (value.cpu().numpy() for value in choice)
    if not hasattr(candidates, "iloc"):
        return Acquisition(positions, gains, scores)
    series = require("pandas", "pandas", "tables").Series
    labels = candidates.index
    return Acquisition(positions, series(gains, labels[positions], name="gain"), series(scores, labels, name="score"))
