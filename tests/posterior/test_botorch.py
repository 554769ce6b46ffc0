"""A posterior as a BoTorch model: moments against predictions, gradients against differences, and what it is for."""

import dataclasses
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, PosteriorMean, qKnowledgeGradient, qLogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler

from ibaml import MetaLearner, make_algorithm
from ibaml.algorithms import Algorithm
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.train import TrainerSettings

ONE_STEP = TrainerSettings(num_steps=1, tasks_per_step=2)
DOUBLE = torch.float64
# BoTorch and its dependencies warn of their own use of torch.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def pairs(num_targets: int = 1, num_tasks: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    tasks = []
    for _ in range(num_tasks):
        x = 5 + 3 * rng.normal(size=(14, 2))
        y = 50 + 7 * np.tanh(x @ rng.normal(size=(2, num_targets)) / 4) + rng.normal(size=(14, num_targets))
        tasks.append((x, y[:, 0] if num_targets == 1 else y))
    return tasks


def fitted(name: str = "linear_gaussian", num_targets: int = 1, **settings) -> MetaLearner:
    network = MLP(
        num_targets, input_shape=2, hidden_sizes=(8,), activation="tanh", generator=torch.Generator().manual_seed(0)
    ).double()
    likelihood = Gaussian(num_targets=num_targets, initial_noise_variance=0.2)
    learner = MetaLearner(network, make_algorithm(name, **settings), likelihood)
    learner.fit(pairs(num_targets), settings=ONE_STEP)
    return learner.with_fitted(dataclasses.replace(learner.fitted_model, temperature=1.2))


HEADS = [("linear_gaussian", 3), ("linear_gaussian", 12), ("gp", 5)]


@pytest.mark.parametrize(("name", "num_known"), HEADS)
@pytest.mark.parametrize("num_targets", [1, 2])
def test_moments_are_those_of_predictions_and_draws(name: str, num_known: int, num_targets: int) -> None:
    learner = fitted(name, num_targets)
    x, y = pairs(num_targets)[1]
    posterior = learner.adapt(x[:num_known], y[:num_known])
    model = posterior.to_botorch()
    assert model.num_outputs == num_targets and model.batch_shape == torch.Size()
    inputs = torch.from_numpy(x[:12]).reshape(3, 4, 2)
    found = model.posterior(inputs)
    assert found.mean.shape == found.variance.shape == (3, 4, num_targets)
    prediction = posterior.predict(x[:12])
    shape = (3, 4, num_targets)
    np.testing.assert_allclose(found.mean, prediction.mean.reshape(shape), rtol=1e-9)
    np.testing.assert_allclose(found.variance, prediction.epistemic.reshape(shape), rtol=1e-7)
    noisy = model.posterior(inputs, observation_noise=True)
    np.testing.assert_allclose(noisy.variance, prediction.total_uncertainty.reshape(shape), rtol=1e-7)
    given = model.posterior(inputs, observation_noise=torch.full((1, num_targets), 3.0, dtype=DOUBLE))
    torch.testing.assert_close(given.variance, found.variance + 3)
    # Jointly: covariances between rows, none between targets.
    moments = learner.fitted_model.joint_moments(posterior.value, learner.fitted_model.encode("x", x[:4]))
    covariance = found.distribution.covariance_matrix[0].reshape(4, num_targets, 4, num_targets)
    for one in range(num_targets):
        for other in range(num_targets):
            expected = moments.covariance[one] if one == other else torch.zeros(4, 4, dtype=DOUBLE)
            torch.testing.assert_close(covariance[:, one, :, other], expected, rtol=1e-7, atol=1e-7)
    single = model.posterior(inputs[0], output_indices=[num_targets - 1])
    torch.testing.assert_close(single.mean, found.mean[0, :, [-1]])
    weights = torch.ones(num_targets, dtype=DOUBLE)
    scalarised = model.posterior(inputs, posterior_transform=ScalarizedPosteriorTransform(weights))
    torch.testing.assert_close(scalarised.mean[..., 0], found.mean.sum(-1))


@pytest.mark.parametrize(("name", "num_known"), HEADS)
def test_gradients_in_the_inputs_are_those_of_differences(name: str, num_known: int) -> None:
    x, y = pairs()[0]
    model = fitted(name).adapt(x[:num_known], y[:num_known]).to_botorch()

    def summary(inputs: torch.Tensor) -> torch.Tensor:
        found = model.posterior(inputs)
        return found.mean.sum() + (found.distribution.covariance_matrix**2).sum()

    inputs = torch.from_numpy(x[-4:]).reshape(2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(summary, (inputs,), eps=1e-5, atol=1e-5, rtol=1e-5)
    acquisition = LogExpectedImprovement(model, best_f=float(y.mean()))
    assert torch.autograd.gradcheck(acquisition, (inputs.detach()[:, :1].requires_grad_(),), eps=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "num_known"), HEADS)
def test_conditioning_is_an_update_also_for_batches_of_fantasies(name: str, num_known: int) -> None:
    x, y = pairs()[1]
    posterior = fitted(name).adapt(x[:num_known], y[:num_known])
    model = posterior.to_botorch()
    more, asked = torch.from_numpy(x[-3:-1]), torch.from_numpy(x[:5])
    outcomes = torch.tensor([[40.0], [55.0]], dtype=DOUBLE)
    found = model.condition_on_observations(more, outcomes).posterior(asked)
    expected = posterior.update(more, outcomes[:, 0]).predict(asked)
    torch.testing.assert_close(found.mean[:, 0], expected.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.variance[:, 0], expected.epistemic, rtol=1e-6, atol=0)
    # Fantasies: four outcomes at each of two batches of two rows.
    batch = torch.stack([more, more + 1])
    fantasies = model.fantasize(batch, SobolQMCNormalSampler(torch.Size([4]), seed=0))
    assert fantasies.batch_shape == (4, 2)
    of_fantasies = fantasies.posterior(asked)
    assert of_fantasies.mean.shape == (4, 2, 5, 1)
    several = torch.randn(4, 2, 2, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) + 50
    chosen = model.condition_on_observations(batch, several)
    again = chosen.condition_on_observations(asked[:1], torch.tensor([[30.0]], dtype=DOUBLE))
    assert again.batch_shape == (4, 2)
    for row in range(4):
        for column in range(2):
            one = posterior.update(batch[column], several[row, column, :, 0])
            torch.testing.assert_close(
                chosen.posterior(asked).mean[row, column, :, 0], one.predict(asked).mean, rtol=1e-8, atol=0
            )
            two = one.update(asked[:1], torch.tensor([30.0], dtype=DOUBLE)).predict(asked)
            torch.testing.assert_close(again.posterior(asked).mean[row, column, :, 0], two.mean, rtol=1e-8, atol=0)
            # The variance does not depend on the outcomes.
            torch.testing.assert_close(
                of_fantasies.variance[row, column, :, 0], one.predict(asked).epistemic, rtol=1e-5, atol=0
            )
    # An acquisition that looks a step ahead is differentiable through its fantasies.
    look_ahead = qKnowledgeGradient(model, num_fantasies=2, sampler=SobolQMCNormalSampler(torch.Size([2]), seed=0))
    rows = torch.from_numpy(x[-3:]).reshape(1, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(look_ahead, (rows,), eps=1e-5, atol=1e-4, rtol=1e-4)


def curve(x: np.ndarray, place: float) -> np.ndarray:
    """A bump whose place differs from task to task."""
    return 20 * np.exp(-0.5 * ((x[:, 0] - place) / 0.8) ** 2)


def test_optimised_acquisition_finds_the_maximum_of_a_new_task() -> None:
    """Five measurements by expected improvement are nearer to the top of each of three tasks than five at random."""
    rng = np.random.default_rng(0)
    train = []
    for _ in range(40):
        x = rng.uniform(-5, 5, size=(20, 1))
        train.append((x, curve(x, rng.uniform(-4, 4)) + 0.3 * rng.normal(size=20)))
    learner = MetaLearner(MLP(1, input_shape=1, hidden_sizes=()), make_algorithm("gp", outer="marginal"), "gaussian")
    learner.fit(
        train, settings=TrainerSettings(num_steps=60, tasks_per_step=8, learning_rate=3e-2, log_var_learning_rate=0.1)
    )
    bounds = torch.tensor([[-5.0], [5.0]], dtype=DOUBLE)
    regrets = []
    for task, place in enumerate([-3.5, 0.4, 3.7]):
        x = rng.uniform(-5, 5, size=(2, 1))
        at_random = np.concatenate([x, rng.uniform(-5, 5, size=(5, 1))])
        posterior = learner.adapt(x, curve(x, place))
        for step in range(5):
            model = posterior.to_botorch()
            acquisition = qLogExpectedImprovement(
                model, best_f=float(curve(x, place).max()), sampler=SobolQMCNormalSampler(torch.Size([64]), seed=step)
            )
            torch.manual_seed(10 * task + step)  # noqa: TID251 - BoTorch draws its starts from the global generator
            chosen, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=32)
            # No grid point is better than what the gradient found.
            grid = torch.linspace(-5, 5, 201, dtype=DOUBLE).reshape(-1, 1, 1)
            assert float(value) > float(acquisition(grid).max()) - 0.05
            x = np.concatenate([x, chosen.numpy()])
            posterior = posterior.update(x[-1:], curve(x[-1:], place))
        regrets.append((20 - curve(x, place).max(), 20 - curve(at_random, place).max()))
        best, _ = optimize_acqf(PosteriorMean(posterior.to_botorch()), bounds, q=1, num_restarts=4, raw_samples=64)
        assert abs(float(best) - place) < 0.5
    by_acquisition, by_chance = np.array(regrets).T
    assert by_acquisition.max() < 1 and by_acquisition.mean() < by_chance.mean() / 4


def test_columns_of_numbers_are_inputs_in_their_order() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"group": np.repeat(list("abcd"), 8), "a": rng.normal(size=32), "b": rng.normal(size=32)})
    table["y"] = 3 * table.a - table.b + rng.normal(size=32)
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian").fit(
        table, task="group", target="y", num_steps=1
    )
    posterior = learner.adapt(table[:4], table.y[:4])
    found = posterior.to_botorch().posterior(torch.from_numpy(np.array(table[["a", "b"]])[:5]))
    np.testing.assert_allclose(found.mean[:, 0], posterior.predict(table[:5]).mean, rtol=1e-5)
    assert found.mean.dtype == DOUBLE
    table["kind"] = np.tile(list("xyzw"), 8)
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian").fit(
        table, task="group", target="y", num_steps=1
    )
    with pytest.raises(ValueError, match="column 'kind' holds categories or gaps, but BoTorch moves along numbers"):
        learner.adapt(table[:4], table.y[:4]).to_botorch()


def test_what_is_no_gaussian_or_not_exact_is_refused(monkeypatch) -> None:
    x, y = pairs()[0]
    weights: Algorithm = make_algorithm("ibaml")
    network = MLP(1, input_shape=2, hidden_sizes=()).double()
    sampled = MetaLearner(network, weights, Gaussian()).fit(pairs(), settings=ONE_STEP).adapt(x[:3], y[:3])
    with pytest.raises(ValueError, match=re.escape("heads with Gaussian noise alone, but the algorithm is 'ibaml'")):
        sampled.to_botorch()
    posterior = fitted().adapt(x[:3], y[:3])
    more = torch.from_numpy(x[:1]), torch.zeros(1, 1, dtype=DOUBLE)
    with pytest.raises(ValueError, match="noise: observations have the noise that the model has learned"):
        posterior.to_botorch().condition_on_observations(*more, noise=torch.ones(1, 1))
    diagonal = fitted(covariance="diagonal").adapt(x[:3], y[:3]).to_botorch()
    assert diagonal.posterior(more[0]).mean.shape == (1, 1)
    with pytest.raises(ValueError, match="'linear_gaussian', as it is set, takes all examples for an update"):
        diagonal.condition_on_observations(*more)
    monkeypatch.setitem(sys.modules, "botorch", None)
    with pytest.raises(ImportError, match=r"needs BoTorch, which is not installed: pip install 'ibaml\[botorch"):
        posterior.to_botorch()
