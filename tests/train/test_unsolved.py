"""Training says where its implicit gradient is not that of the solved problem."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from ibaml import MetaLearner, TrainerSettings, algorithms
from ibaml.algorithms import MetaParameters
from ibaml.algorithms.model import build_model
from ibaml.data.linear_regression import LinearRegressionTasks
from ibaml.likelihoods import Gaussian
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.solvers.inner import NaturalGradient, RelativeAdam
from ibaml.solvers.linear import Dense
from ibaml.train.evaluate import draw_task
from ibaml.train.unsolved import bias_of

TASKS = LinearRegressionTasks(
    prior_mean=torch.tensor([1.0, -0.5]),
    prior_variance=torch.tensor([0.5, 1.5]),
    noise_variance=1.0,
    num_shots=5,
    num_queries=10,
)
UNSOLVED = algorithms.ibaml(inner=RelativeAdam(num_steps=4, learning_rate=0.05), num_samples=4, temperature=1.0)
SOLVED = dataclasses.replace(UNSOLVED, inner=NaturalGradient(num_steps=15, learning_rate=1.0), linear=Dense())


def bias(algorithm: Any) -> str | None:
    """At the prior that the tasks are from."""
    model = build_model(nn.Linear(2, 1, bias=False), Gaussian(num_targets=1))
    prior: Any = DiagonalGaussian({"weight": TASKS.prior_mean[None]}, {"weight": TASKS.prior_variance.log()[None]})
    if not algorithm.is_bayesian:
        prior = prior.mean
    meta = MetaParameters(prior, {Gaussian.parameter_name: torch.tensor([math.log(TASKS.noise_variance)])})
    tasks = [draw_task(TASKS, index, seed=3) for index in range(4)]
    return bias_of(model, algorithm, meta, tasks, generator=torch.Generator().manual_seed(0))


def test_a_problem_that_is_not_solved_is_told_of() -> None:
    told = bias(UNSOLVED)
    assert told is not None and told.startswith("the inner problem is not solved in 4 steps, and the implicit gradient")
    assert "of the prior (mean of 4 validation tasks)" in told and "Take more inner steps" in told


@pytest.mark.parametrize("algorithm", [SOLVED, algorithms.abml(), algorithms.maml()], ids=lambda one: one.name)
def test_nothing_is_said_of_what_is_solved_or_exact(algorithm: Any) -> None:
    assert bias(algorithm) is None


def test_long_training_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(num_steps: int) -> None:
        settings = TrainerSettings(num_steps=num_steps, tasks_per_step=1, validate_every=1, num_validation_tasks=2)
        wide = dataclasses.replace(UNSOLVED, prior=DiagonalPrior(initial_log_var=(0.0, 0.1)))
        learner = MetaLearner(nn.Linear(2, 1), wide, "gaussian")
        learner.fit(TASKS, TASKS, settings=dataclasses.replace(settings, fast=False))

    fit(1)
    monkeypatch.setattr("ibaml.train.trainer.LEAST_STEPS", 3)
    with pytest.warns(RuntimeWarning, match="the inner problem is not solved in 4 steps") as told:
        fit(4)
    assert len(told) == 1
