"""The covariance between rows, against updates with what another row came out as."""

import re

import numpy as np
import pytest
import torch

from ibaml import MetaLearner
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.heads.gaussian import MOST_JOINTLY
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.train import TrainerSettings

ONE_STEP = TrainerSettings(num_steps=1, tasks_per_step=2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 12, 2))
Y = np.stack([50 + 7 * X[..., 0], 3 * X[..., 1] - 1], -1) + RNG.normal(size=(4, 12, 2))


def learner(algorithm="linear_gaussian", *, num_targets=1):
    network = MLP(num_targets, input_shape=2, hidden_sizes=(5,), generator=torch.Generator().manual_seed(0)).double()
    likelihood = Gaussian(num_targets=num_targets, initial_noise_variance=0.2)
    tasks = [(x, y if num_targets == 2 else y[:, 0]) for x, y in zip(X, Y, strict=True)]
    return MetaLearner(network, make_algorithm(algorithm), likelihood).fit(tasks, settings=ONE_STEP)


@pytest.mark.parametrize("algorithm", ["linear_gaussian", "gp"])
def test_what_one_row_tells_of_the_others_is_the_covariance_with_it(algorithm):
    """``E[y_j | y_0]`` moves by ``cov(y_j, y_0) / var(y_0)`` for each unit of ``y_0``."""
    posterior = learner(algorithm).adapt(X[1][:5], Y[1][:5, 0])
    asked = X[1][6:]
    prediction = posterior.predict(asked, joint=True)
    assert prediction.covariance.shape == (6, 6) and isinstance(prediction.covariance, np.ndarray)
    np.testing.assert_allclose(np.diag(prediction.covariance), prediction.total_uncertainty, rtol=1e-6)
    low, high = (posterior.update(asked[:1], [value]).predict(asked[1:]).mean for value in (40.0, 41.0))
    expected = prediction.covariance[1:, 0] / prediction.covariance[0, 0]
    np.testing.assert_allclose(high - low, expected, rtol=1e-6)


def test_targets_have_a_matrix_each_in_units_of_their_own():
    posterior = learner(num_targets=2).calibrate(3 * list(zip(X, Y, strict=True))).adapt(X[1][:5], Y[1][:5])
    prediction = posterior.predict(X[1][6:], joint=True)
    assert prediction.covariance.shape == (2, 6, 6)
    np.testing.assert_allclose(
        np.diagonal(prediction.covariance, axis1=1, axis2=2).T, prediction.total_uncertainty, rtol=1e-6
    )


def test_it_is_given_where_it_was_asked_for_and_is_known():
    posterior = learner().adapt(X[1][:5], Y[1][:5, 0])
    with pytest.raises(ValueError, match=re.escape("not asked for: get it by posterior.predict(x, joint=True)")):
        posterior.predict(X[1]).covariance  # noqa: B018
    with pytest.raises(ValueError, match=f"joint=True at {MOST_JOINTLY + 1} rows takes the covariance of all pairs"):
        posterior.predict(np.zeros((MOST_JOINTLY + 1, 2)), joint=True)
    with pytest.raises(ValueError, match="known for heads with Gaussian noise alone, but the algorithm is 'maml'"):
        learner("maml").adapt(X[1][:5], Y[1][:5, 0]).predict(X[1], joint=True)
