"""How baselines without training are tuned: all candidates are tried on the validation tasks, and the best is kept.

Each candidate first gets the one number that its confidence hangs on, from the same validation tasks. For classes it is
the output temperature. For numbers it is the noise variance ``s2`` of each target: where the prediction with ``s2 = 1``
is ``N(mean, v)``, that with noise ``s2`` is ``N(mean, s2 v)``, and the likeliest ``s2`` is the mean of
``(target - mean)^2 / v`` over the query examples of the validation tasks, every task with the same weight. Of ridge
regression, with a prior variance in units of the noise, ``v = 1 + z^T (Z^T Z + R)^-1 z``; of others ``v = 1``.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ibaml.algorithms import MetaParameters
from ibaml.algorithms.heads import LinearGaussian, Softmax
from ibaml.baselines.base import FittedBaseline, Problem, initial_meta
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.ragged import TaskSplits
from ibaml.learner import MetaLearner
from ibaml.likelihoods import Gaussian
from ibaml.priors import DiagonalColumnPrior
from ibaml.train.evaluate import Evaluation
from ibaml.train.temperature import recalibrate
from ibaml.types import Batch, TaskSampler, Tensor

_SMALLEST_NOISE = 1e-10
_NUM_DRAWS = 400
_MOST_ROWS = 20_000
_MOST_NUMBERS = 2e7
_BIAS_VARIANCES = (1.0, 100.0)
"""Prior variances of the constant's weight that are tried: of unit size, and as good as free."""


class Candidate(NamedTuple):
    """Settings to try.

    Attributes:
        described: The settings in words.
        learner: Fitted with them, numbers with a noise variance of 1.
    """

    described: str
    learner: MetaLearner


class Rows(NamedTuple):
    """Examples of the training tasks together, whatever their task.

    Attributes:
        x: Inputs, flattened, ``[num_rows, num_features]``.
        y: Targets.
    """

    x: Tensor
    y: Tensor

    @property
    def spread(self) -> float:
        """Mean squared distance of an input to their mean."""
        return max(float(((self.x - self.x.mean(0)) ** 2).sum(-1).mean()), 1e-12)


def with_penalty(
    problem: Problem, algorithm: Softmax | LinearGaussian, variance: float, bias_variance: float
) -> MetaLearner:
    """Returns a linear model for each task on its support set alone, fitted by its settings.

    Args:
        problem: The tasks.
        algorithm: The head, with a diagonal prior of mean zero.
        variance: Prior variance of weights, whose inverse is the penalty; of numbers in units of the noise.
        bias_variance: That of the constant's weight.
    """
    assert isinstance(algorithm.prior, DiagonalColumnPrior)
    num_features = math.prod(problem.train.input_shape)
    prior = dataclasses.replace(
        algorithm.prior, initial_variance=variance * num_features, initial_bias_variance=bias_variance
    )
    learner = problem.linear(dataclasses.replace(algorithm, prior=prior))
    return problem.with_meta_parameters(learner, initial_meta(learner))


def choose_penalty(
    problem: Problem,
    algorithm: Softmax | LinearGaussian,
    strengths: Sequence[float],
    describe: Callable[[float, float], str],
) -> FittedBaseline:
    """Chooses the penalty of a linear model for each task, and whether the constant has one too.

    Args:
        problem: The tasks.
        algorithm: The head.
        strengths: Prior variances of an output.
        describe: Says in words what prior variances of a weight and of the constant's are.
    """
    spread = training_rows(problem).spread
    pairs = ((strength / spread, bias) for strength, bias in itertools.product(strengths, _BIAS_VARIANCES))
    return choose(problem, (Candidate(describe(*pair), with_penalty(problem, algorithm, *pair)) for pair in pairs))


def choose(problem: Problem, candidates: Iterable[Candidate]) -> FittedBaseline:
    """Returns the candidate with the least nll on the validation tasks.

    Args:
        problem: The tasks.
        candidates: Settings to try, at least one.

    Cost:
        One evaluation of the validation tasks for each candidate.
    """
    start = time.monotonic()
    best: tuple[float, Candidate] | None = None
    for candidate in candidates:
        learner, nll = with_confidence(problem, candidate.learner)
        if math.isfinite(nll) and (best is None or nll < best[0]):
            best = nll, candidate._replace(learner=learner)
    if best is None:
        raise FloatingPointError("no settings give finite predictions on the validation tasks.")
    return FittedBaseline(best[1].learner, best[1].described, time.monotonic() - start)


def with_confidence(problem: Problem, learner: MetaLearner) -> tuple[MetaLearner, float]:
    """Returns a learner whose confidence suits the validation tasks, and its nll on them."""
    evaluation = problem.validate(learner)
    if not problem.is_regression:
        return tempered(learner, evaluation)
    variance = residual_variance(evaluation)
    return with_noise(learner, variance), _gaussian_nll(evaluation, variance)


def tempered(learner: MetaLearner, evaluation: Evaluation) -> tuple[MetaLearner, float]:
    """Returns a learner with the temperature of least nll, and that nll.

    Args:
        learner: A fitted learner of temperature 1.
        evaluation: Its predictions for the validation tasks.
    """
    temperature = recalibrate(evaluation.predictions, evaluation.query_targets, sources=evaluation.sources).temperature
    nlls = [
        float(prediction.tempered(temperature).nll(targets).double().mean())
        for prediction, targets in zip(evaluation.predictions, evaluation.query_targets, strict=True)
    ]
    fitted = dataclasses.replace(learner.fitted_model, temperature=temperature)
    return learner.with_fitted(fitted), sum(nlls) / len(nlls)


def residual_variance(evaluation: Evaluation) -> Tensor:
    """Returns the likeliest factor of all variances, for each target; every task has the same weight."""
    # Of targets where they were measured.
    ratios = [(error**2 / variance).nanmean(0) for error, variance in _errors(evaluation)]
    return torch.stack(ratios).nanmean(0).clamp_min(_SMALLEST_NOISE)


def _gaussian_nll(evaluation: Evaluation, factor: Tensor) -> float:
    """Returns the nll of the predictions with all variances times a factor."""
    nlls = [
        0.5 * (error**2 / (factor * variance) + torch.log(2 * math.pi * factor * variance)).nansum(-1).mean()
        for error, variance in _errors(evaluation)
    ]
    return float(torch.stack(nlls).mean())


def _errors(evaluation: Evaluation) -> Iterator[tuple[Tensor, Tensor]]:
    for prediction, targets in zip(evaluation.predictions, evaluation.query_targets, strict=True):
        described = prediction.tensors()
        yield targets.double() - described["mean"], described["variance"]


def with_noise(learner: MetaLearner, variance: Tensor) -> MetaLearner:
    """Returns a learner of numbers with a noise variance for each target; prior variances of weights grow with it."""
    fitted = learner.fitted_model
    prior, shared = fitted.meta
    before = shared[Gaussian.parameter_name]
    log_factor = torch.log(variance).to(before)
    if isinstance(fitted.algorithm, LinearGaussian):
        prior = prior._replace(log_var=prior.log_var + log_factor.unsqueeze(-1))
    shared = {**shared, Gaussian.parameter_name: before + log_factor}
    return learner.with_fitted(dataclasses.replace(fitted, meta=MetaParameters(prior, shared)))


def training_rows(problem: Problem) -> Rows:
    """Returns the rows of the training tasks, or of some draws from them; a random part if there are very many."""
    generator = torch.Generator().manual_seed(problem.settings.seed)
    most = min(_MOST_ROWS, max(int(_MOST_NUMBERS / math.prod(problem.train.input_shape)), 1))
    batches = list(_batches(problem.train, most, generator))
    x, y = torch.cat([batch.x for batch in batches]).flatten(1), torch.cat([batch.y for batch in batches])
    if len(x) > most:
        chosen = torch.randperm(len(x), generator=generator)[:most].to(x.device)
        x, y = x[chosen], y[chosen]
    return Rows(x, y)


def _batches(tasks: TaskSampler, most: int, generator: torch.Generator) -> Iterator[Batch]:
    if isinstance(tasks, TaskSplits):
        yield from tasks.tasks
        return
    if isinstance(tasks, FixedEpisodes):
        yield from (batch for episode in tasks.episodes for batch in episode)
        return
    num_rows = 0
    for _ in range(_NUM_DRAWS):
        for batch in tasks.sample(1, generator=generator):
            num_rows += len(batch.y[0])
            yield Batch(batch.x[0], batch.y[0])
        if num_rows >= most:
            return
