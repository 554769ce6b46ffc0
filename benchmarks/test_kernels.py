"""The pieces of a meta-step one by one: ``pytest benchmarks --benchmark-enable``.

All on one task of Conv4-64, 28 x 28, 5-way 1-shot, iBaML with K = L = 5 and S = 2.
"""

from functools import partial

import pytest
import torch

from benchmarks.candidates import BASELINE, LIBRARY, candidates
from benchmarks.measure import plain_passes
from benchmarks.problems import Case, build_problem
from ibaml import tree
from ibaml.algorithms import objectives
from ibaml.solvers.curvature import value_gradient_and_hvp
from ibaml.solvers.linear import cg

CASE = Case(network="conv4_64_28", algorithm="ibaml", num_linear_steps=5, num_tasks=1)


@pytest.fixture(scope="module")
def problem():
    return build_problem(CASE)


@pytest.fixture(scope="module")
def expected_nll(problem):
    """The nll of the support set as a function of the posterior."""
    support, noise = problem.episodes[0].support, problem.noises[0].inner
    return lambda posterior: objectives.expected_nll(
        lambda weights, batch: problem.model.per_example(weights, {}, batch), posterior, noise, support
    )


@pytest.mark.parametrize("way", ["channels first", "channels last"])
def test_plain_forward_and_backward(benchmark, problem, way):
    gradient = benchmark(plain_passes(problem.network, problem.episodes[0].support)[way])
    assert tree.all_finite(list(gradient))


def test_gradient_of_the_expected_nll(benchmark, problem, expected_nll):
    gradient = benchmark(torch.func.grad(expected_nll), problem.meta.prior)
    assert tree.all_finite(gradient)


def test_hessian_vector_product(benchmark, problem, expected_nll):
    _, gradient, product = value_gradient_and_hvp(expected_nll, problem.meta.prior)
    assert tree.all_finite(benchmark(product, gradient))


def test_vector_updates_of_conjugate_gradients(benchmark, problem):
    # A diagonal matrix costs next to nothing: what is left are the solver's own operations on vectors.
    rhs = problem.meta.prior
    diagonal = tree.map(lambda leaf: 1 + torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)), rhs)
    solution = benchmark(partial(cg, partial(tree.mul, diagonal), max_steps=5, rtol=0.0), rhs)
    assert int(solution.num_steps) == 5
    assert solution.residual_norm < 1e-2 * tree.norm(rhs)


@pytest.mark.parametrize("candidate", [BASELINE, LIBRARY])
def test_meta_step(benchmark, problem, candidate):
    gradient = benchmark(candidates("ibaml")[candidate](problem))
    assert [each.shape for each in gradient] == [each.shape for each in problem.meta_leaves()]
