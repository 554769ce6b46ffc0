"""Functions drawn from Gaussian heads follow the posterior that their moments tell, jointly."""

import pytest
import torch

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.heads.gaussian import HeadOfFunctions
from ibaml.types import Batch

NUM_DRAWS = 20_000
HEADS = {
    "linear, fewer weights": ("linear_gaussian", {}, 12),
    "linear, fewer examples": ("linear_gaussian", {"prior": "full"}, 2),
    "linear, diagonal": ("linear_gaussian", {"covariance": "diagonal"}, 12),
    "process": ("gp", {}, 6),
}


@pytest.mark.parametrize("name", HEADS)
def test_draws_have_the_moments_of_the_posterior(name: str) -> None:
    algorithm, settings, num_support = HEADS[name]
    head = make_algorithm(algorithm, **settings)
    assert isinstance(head, HeadOfFunctions)
    source = torch.Generator().manual_seed(0)

    def inputs(size: int) -> torch.Tensor:
        features = torch.randn(size, 3, generator=source, dtype=torch.float64)
        return torch.cat([features, torch.ones(size, 1, dtype=torch.float64)], 1)

    prior = head.init_prior(4, 2, like=torch.zeros((), dtype=torch.float64))
    support = Batch(inputs(num_support), torch.randn(num_support, 2, generator=source, dtype=torch.float64))
    shared = {"likelihood.log_noise_variance": torch.tensor([-1.0, 0.0], dtype=torch.float64)}
    solution, _ = head.solve(prior, shared, support, 2)
    query = inputs(5)
    draws = head.draw(solution, query, NUM_DRAWS, generator=source)
    assert draws.shape == (NUM_DRAWS, 5, 2)
    mean, variance = head.moments(solution, query)
    joint = head.joint_covariance(solution, query)
    torch.testing.assert_close(torch.diagonal(joint, dim1=-2, dim2=-1), variance, rtol=1e-8, atol=1e-10)
    error = (variance / NUM_DRAWS).sqrt()
    assert ((draws.mean(0).mT - mean).abs() < 5 * error).all()
    for target in range(2):
        found = torch.cov(draws[..., target].mT)
        # Of a sample covariance: (v_i v_j + c_ij^2) / n.
        deviation = ((variance[target, :, None] * variance[target] + joint[target] ** 2) / NUM_DRAWS).sqrt()
        assert ((found - joint[target]).abs() < 5 * deviation).all()


def test_too_many_inputs_at_once_are_refused() -> None:
    head = make_algorithm("linear_gaussian")
    assert isinstance(head, HeadOfFunctions)
    with pytest.raises(ValueError, match="samples at 2001 inputs take their joint covariance; expected at most 2000"):
        head.draw(None, torch.zeros(2001, 2), 1, generator=torch.Generator())
