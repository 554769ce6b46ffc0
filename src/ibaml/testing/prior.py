"""What every family of priors promises."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as reference_kl

from ibaml import tree
from ibaml.priors import Prior
from ibaml.priors.base import implicit_system
from ibaml.testing.base import (
    DIFFERENCE,
    STANDARD_ERRORS,
    assert_close,
    assert_json_round_trip,
    central_difference,
    draw,
    draw_like,
    generator,
    over_seeds,
)
from ibaml.types import Params, Tensor

_NUM_DRAWS = 20_000


class PriorContract:
    """Samples against their moments, divergences against closed forms and derivatives, and the bookkeeping.

    Weights are a dict of a 2 x 3 matrix and two numbers. Posteriors are members near what ``init`` gives.
    """

    @staticmethod
    def make() -> Prior:
        """Returns the family to test."""
        raise NotImplementedError

    @pytest.fixture
    def prior(self) -> Prior:
        """The family to test."""
        return self.make()

    def test_first_member_is_around_the_initial_weights(self, prior: Prior) -> None:
        """Its mean is the weights, and it depends on the generator alone."""
        weights = _weights()
        member = prior.init(weights, generator=generator(1))
        assert_close(prior.mean(member), weights)
        assert_close(prior.init(weights, generator=generator(1)), member)
        assert all(leaf.dtype == torch.float64 for leaf in tree.leaves(member))
        narrow = prior.init(tree.map(lambda leaf: leaf.float(), weights), generator=generator(1))
        assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(narrow))

    def test_noise_follows_the_generator_and_has_the_shapes_of_the_weights(self, prior: Prior) -> None:
        """Empty for points; else a leading axis, and pairs of opposite sign if asked for."""
        member = _member(prior)
        noise = prior.draw_noise(member, 6, generator=generator(2))
        if not prior.is_distribution:
            assert noise == {}
            return
        assert_close(prior.draw_noise(member, 6, generator=generator(2)), noise)
        assert tree.norm(tree.sub(prior.draw_noise(member, 6, generator=generator(3)), noise)) > 0
        assert all(leaf.shape[0] == 6 for leaf in tree.leaves(noise))
        paired = prior.draw_noise(member, 6, generator=generator(2), antithetic=True)
        assert_close(tree.map(lambda leaf: leaf[:3], paired), tree.map(lambda leaf: -leaf[3:], paired))
        for num_samples, antithetic in ((0, False), (3, True)):
            with pytest.raises(ValueError, match="num_samples"):
                prior.draw_noise(member, num_samples, generator=generator(), antithetic=antithetic)

    def test_samples_have_the_mean_of_the_member(self, prior: Prior) -> None:
        """Within five standard errors; weights come by name, in their shapes."""
        member, weights = _member(prior), _weights()
        if not prior.is_distribution:
            assert_close(prior.sample(member, {}), prior.mean(member))
            return
        draws = prior.sample(member, prior.draw_noise(member, _NUM_DRAWS, generator=generator(2)))
        for name, mean in prior.mean(member).items():
            assert draws[name].shape == (_NUM_DRAWS, *weights[name].shape)
            error = (draws[name].mean(0) - mean).abs()
            assert (error <= STANDARD_ERRORS * draws[name].std(0) / math.sqrt(_NUM_DRAWS)).all(), name

    def test_samples_are_a_differentiable_map_of_the_noise(self, prior: Prior) -> None:
        """The reparameterisation: derivatives in the member equal central differences, one draw at a time or many."""
        member = _member(prior)
        noise = prior.draw_noise(member, 2, generator=generator(2))
        first = tree.map(lambda leaf: leaf[0], noise)
        direction = draw_like(_weights(), seed=3)

        def along(q: Any) -> Tensor:
            return tree.dot(direction, prior.sample(q, first))

        assert_close(torch.func.grad(along)(member), central_difference(along, member), DIFFERENCE)
        if prior.is_distribution:
            many = prior.sample(member, noise)
            assert_close(tree.map(lambda leaf: leaf[0], many), prior.sample(member, first))

    def test_divergence_is_that_of_the_samples(self, prior: Prior) -> None:
        """Where weights are affine in the noise they are Gaussian: ``KL(N(m, J J^T) || N(m', J' J'^T))`` by torch."""
        posterior, other = _member(prior, 1, 0.3), _member(prior)
        if not prior.is_distribution:
            pytest.skip("points have no Kullback-Leibler divergence")
        gaussian, other_gaussian = _as_gaussian(prior, posterior), _as_gaussian(prior, other)
        if gaussian is None or other_gaussian is None:
            pytest.skip("weights are not affine in the noise: there is no closed form")
        assert_close(prior.divergence(posterior, other), reference_kl(gaussian, other_gaussian))

    def test_divergence_is_zero_for_equal_members_and_positive_for_others(self, prior: Prior) -> None:
        """Of any two members."""

        def check(seed: int) -> None:
            posterior, other = _member(prior, seed, 0.3), _member(prior)
            assert prior.divergence(posterior, other).shape == ()
            assert prior.divergence(posterior, other) > 0
            assert_close(prior.divergence(posterior, posterior), torch.zeros((), dtype=torch.float64))

        over_seeds(check)

    def test_gradient_of_the_divergence_is_that_of_autograd(self, prior: Prior) -> None:
        """And so are its derivatives in both members, which unrolled and implicit gradients need."""
        posterior, other, cotangent = _member(prior, 1, 0.3), _member(prior), draw_like(_member(prior), seed=4)
        by_autograd = torch.func.grad(prior.divergence)
        assert_close(prior.divergence_gradient(posterior, other), by_autograd(posterior, other))
        found, expected = (
            torch.func.vjp(function, posterior, other)[1](cotangent)
            for function in (prior.divergence_gradient, by_autograd)
        )
        assert_close(found, expected)

    def test_divergence_of_half_precision_is_summed_in_float32(self, prior: Prior) -> None:
        """Sums over millions of weights have no place in 16 bits."""
        posterior, other = (
            tree.map(lambda leaf: leaf.to(torch.bfloat16), member)
            for member in (_member(prior, 1, 0.3), _member(prior))
        )
        value = prior.divergence(posterior, other)
        wide = prior.divergence(*(tree.map(lambda leaf: leaf.double(), member) for member in (posterior, other)))
        assert value.dtype == torch.float32
        assert_close(value.double(), wide, 1e-5)

    def test_flat_weights_are_the_same_as_named_ones(self, prior: Prior) -> None:
        """``map`` there and back is the identity, and commutes with mean, sample and divergence."""
        posterior, other = _member(prior, 1, 0.3), _member(prior)
        weights, noise = _weights(), prior.draw_noise(_member(prior), 3, generator=generator(2))
        _, unravel = tree.ravel(weights)

        def flat(named: Params) -> Params:
            return {"flat": tree.ravel(named)[0]}

        def back(vector: Params) -> Params:
            return unravel(vector["flat"])

        flat_posterior, flat_other = prior.map(flat, posterior), prior.map(flat, other)
        assert_close(prior.map(back, flat_posterior), posterior)
        assert_close(prior.mean(flat_posterior), flat(prior.mean(posterior)))
        assert_close(prior.divergence(flat_posterior, flat_other), prior.divergence(posterior, other))
        flat_noise = torch.func.vmap(flat)(noise) if noise else {}
        samples = prior.sample(flat_posterior, flat_noise)
        expected = prior.sample(posterior, noise)
        assert_close(samples, torch.func.vmap(flat)(expected) if noise else flat(expected))

    def test_members_survive_a_checkpoint(self, prior: Prior) -> None:
        """Their tensors have names of their own and rebuild them."""
        member = _member(prior)
        named = tree.named_leaves(member)
        assert len(named) == len(tree.leaves(member))
        values = iter(named.values())
        again = tree.map(lambda leaf: next(values), prior.init(_weights(), generator=generator(9)))
        assert type(again) is type(member)
        assert_close(again, member, 0.0)

    def test_vmap_equals_the_loop(self, prior: Prior) -> None:
        """Samples, divergence and its gradient for a batch of posteriors."""
        other = _member(prior)
        noise = prior.draw_noise(other, 3, generator=generator(2))
        posteriors = [_member(prior, seed, 0.3) for seed in (1, 2, 3)]

        def compute(posterior: Any, noise: Params) -> Any:
            return (
                prior.sample(posterior, noise),
                prior.divergence(posterior, other),
                prior.divergence_gradient(posterior, other),
            )

        stacked = tree.map(lambda *leaves: torch.stack(leaves), *posteriors)
        batched = torch.func.vmap(compute)(stacked, noise)
        for index, posterior in enumerate(posteriors):
            single = compute(posterior, tree.map(lambda leaf, i=index: leaf[i], noise))
            assert_close(tree.map(lambda leaf, i=index: leaf[i], batched), single)

    def test_geometry_is_that_of_the_divergence(self, prior: Prior) -> None:
        """Known curvatures are those of the weighted divergence, scales positive, and the direction Newton's."""
        other, weight = _member(prior), 0.1
        geometry = prior.geometry(other, weight)
        if geometry is None:
            return
        flat, unravel = tree.ravel(other)
        hessian = torch.func.hessian(lambda vector: weight * prior.divergence(unravel(vector), other))(flat)
        known = tree.ravel(geometry.curvature())[0]
        assert_close(known[known > 0], torch.diagonal(hessian)[known > 0])
        assert (known >= 0).all()
        assert (tree.ravel(geometry.scale())[0] > 0).all()
        # Without examples the prior is the optimum: Newton's step ends there up to second order.
        start = tree.add(other, draw_like(other, seed=5, scale=0.05))
        gradient = tree.scale(weight, prior.divergence_gradient(start, other))
        direction = geometry.natural_direction(start, gradient)
        assert tree.dot(direction, gradient) > 0
        assert prior.divergence(tree.sub(start, direction), other) < 0.1 * prior.divergence(start, other)

    def test_implicit_system_is_that_of_the_divergence(self, prior: Prior) -> None:
        """At a stationary posterior; away from one a family may use that it ought to be stationary."""
        posterior, other, weight = _member(prior, 1, 0.3), _member(prior), 0.1
        nll_gradient = tree.scale(-weight, prior.divergence_gradient(posterior, other))
        own = prior.implicit_system(posterior, other, weight, nll_gradient)
        generic = implicit_system(prior.divergence_gradient, posterior, other, weight)
        vector, rest = draw_like(posterior, seed=6), draw_like(posterior, seed=7)
        assert_close(own.add_curvature(rest, vector), generic.add_curvature(rest, vector))
        assert_close(own.add_mixed(rest, vector), generic.add_mixed(rest, vector))
        assert own.preconditioner is None or tree.dot(vector, own.preconditioner(vector)) > 0

    def test_hyper_prior_is_one_of_distributions(self, prior: Prior) -> None:
        """A differentiable scalar, or a refusal."""
        member = _member(prior)
        if not prior.is_distribution:
            with pytest.raises(ValueError, match="hyper_prior_weight"):
                prior.hyper_prior_nll(member)
            return
        assert prior.hyper_prior_nll(member).shape == ()
        gradient = torch.func.grad(prior.hyper_prior_nll)(member)
        assert_close(gradient, central_difference(prior.hyper_prior_nll, member), 10 * DIFFERENCE)

    def test_parameter_groups_hold_each_tensor_once(self, prior: Prior) -> None:
        """Disjoint and complete; only distributions have a width."""
        member = _member(prior)
        where, width = prior.parameter_groups(member)
        assert sorted(map(id, where + width)) == sorted(map(id, tree.leaves(member)))
        assert bool(width) == prior.is_distribution

    def test_json_round_trip(self, prior: Prior) -> None:
        """A family is a record that recipes and saved models can hold."""
        assert_json_round_trip(prior)


def _weights() -> Params:
    return {"weight": draw(2, 3, seed=10), "bias": draw(2, seed=11)}


def _member(prior: Prior, seed: int = 0, spread: float = 0.0) -> Any:
    """The first member, moved at random."""
    member = prior.init(_weights(), generator=generator(0))
    return tree.add(member, draw_like(member, seed=seed, scale=spread))


def _as_gaussian(prior: Prior, member: Any) -> MultivariateNormal | None:
    """Mean and covariance of the weights if they are affine in the noise, else None."""
    noise, unravel = tree.ravel(tree.map(lambda leaf: leaf[0], prior.draw_noise(member, 1, generator=generator(2))))

    def weights(vector: Tensor) -> Tensor:
        return tree.ravel(prior.sample(member, unravel(vector)))[0]

    slope = torch.func.jacrev(weights)(noise)
    elsewhere = 2 * noise + 1
    if not torch.allclose(weights(noise) + slope @ (elsewhere - noise), weights(elsewhere), rtol=1e-9, atol=1e-12):
        return None
    return MultivariateNormal(weights(torch.zeros_like(noise)), slope @ slope.mT)
