"""Nearest neighbours among the support examples, by the inputs as they are."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.baselines.base import FittedBaseline, Problem, initial_meta
from ibaml.baselines.choosing import Candidate, choose, training_rows
from ibaml.learner import MetaLearner


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbours:
    """The average over the nearest support examples, numbers with the noise of the residuals on validation tasks.

    Attributes:
        numbers: Numbers of neighbours, tried on the validation tasks.
        scales: What squared distances are divided by in the weights of neighbours, in units of the mean squared
            distance of inputs to their mean; infinite: all have the same weight.
    """

    numbers: tuple[int, ...] = (1, 3, 5, 10, 20)
    scales: tuple[float, ...] = (0.1, 1.0, math.inf)

    name: ClassVar[str] = "neighbours"

    def suits(self, problem: Problem) -> bool:
        """Whether all targets were measured."""
        return not problem.has_unmeasured_targets

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Chooses the number of neighbours and their weights; see ``Baseline``."""
        del seconds, folder
        spread = training_rows(problem).spread
        return choose(
            problem,
            (
                Candidate(f"k = {number}, {_described(scale)}", nearest_neighbours(problem, number, scale * spread))
                for number, scale in itertools.product(self.numbers, self.scales)
                if number > 1 or scale == math.inf
            ),
        )


def nearest_neighbours(problem: Problem, number: int, scale: float) -> MetaLearner:
    """Returns nearest neighbours, for numbers with noise of variance 1.

    Args:
        problem: The tasks.
        number: Number of neighbours.
        scale: What squared distances are divided by.
    """
    learner = problem.linear(make_algorithm("neighbours", num_neighbours=number))
    prior, shared = initial_meta(learner)
    log_scale = prior.log_scale.new_full((), math.log(scale))
    return problem.with_meta_parameters(learner, MetaParameters(prior._replace(log_scale=log_scale), shared))


def _described(scale: float) -> str:
    return "equal weights" if scale == math.inf else f"weights of scale {scale:g}"
