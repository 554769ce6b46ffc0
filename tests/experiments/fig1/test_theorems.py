from functools import partial

import pytest
import torch

from ibaml import tree
from ibaml.data import LinearRegressionTasks
from ibaml.experiments.fig1 import theorems
from ibaml.experiments.fig1.linear_gaussian import LinearGaussianProblem
from ibaml.experiments.fig1.theorems import theorem_1, theorem_2
from ibaml.solvers.linear import cg, dense
from ibaml.types import InnerSolution

NUM_TASKS = 3


@pytest.fixture(scope="module", params=[0.3, 1.0, 4.0], ids=lambda value: f"prior variance {value}")
def problem(request):
    features = torch.ones(5, dtype=torch.float64)
    sampler = LinearRegressionTasks(
        prior_mean=0.5 * features,
        prior_variance=features,
        noise_variance=0.7,
        num_shots=9,
        num_queries=7,
        condition_number=10.0,
        dtype=torch.float64,
    )
    episodes = sampler.sample(NUM_TASKS, generator=torch.Generator().manual_seed(1))
    return LinearGaussianProblem(episodes, noise_variance=0.7, prior_variance=request.param)


def tasks(problem):
    return [tree.map(lambda leaf, i=i: leaf[i], problem.episodes) for i in range(NUM_TASKS)]


def distance(a, b):
    return tree.norm(tree.sub(a, b))


@pytest.mark.parametrize("num_steps", [1, 8])
def test_the_error_of_theorem_1_is_that_of_the_library(problem, num_steps):
    solver = problem.gradient_descent(num_steps)
    for episode in tasks(problem):
        error = distance(problem.unrolled(solver, episode), problem.exact_hypergradient(episode))
        torch.testing.assert_close(theorem_1(problem, solver, episode).error, error, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 40])
@pytest.mark.parametrize("linear_solver", [partial(cg, max_steps=2, rtol=0.0), dense], ids=["cg", "dense"])
def test_the_error_of_theorem_2_is_that_of_the_library(problem, num_steps, linear_solver):
    solver = problem.gradient_descent(num_steps)
    for episode in tasks(problem):
        gradient = problem.implicit(solver, linear_solver, False, episode)
        error = distance(gradient, problem.exact_hypergradient(episode))
        check = theorem_2(problem, solver, linear_solver, episode)
        torch.testing.assert_close(check.error, error, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_errors_stay_below_their_bounds(problem, num_steps):
    solver = problem.gradient_descent(num_steps)
    for episode in tasks(problem):
        checks = [theorem_1(problem, solver, episode)]
        checks += [theorem_2(problem, solver, partial(cg, max_steps=n, rtol=0.0), episode) for n in (1, 2, 5)]
        assert all(check.error <= check.bound for check in checks)


def test_the_bound_vanishes_at_the_solution_with_an_exact_solver(problem):
    episode = tasks(problem)[0]
    solution = problem.solution(problem.prior, episode.support)

    def solve(loss, init):
        return InnerSolution(solution, grad_norm=torch.zeros(()), num_steps=0)

    check = theorem_2(problem, solve, dense, episode)
    assert check.distance == 0
    assert check.bound < 1e-12


def test_lipschitz_constants_bound_every_pair_of_points_and_are_nearly_reached(problem):
    episode = tasks(problem)[0]
    generator = torch.Generator().manual_seed(0)
    solution = theorems._flat(problem.solution(problem.prior, episode.support))
    functions = {
        "b": partial(theorems._outer_gradient, problem, episode.query),
        "H": lambda point: theorems._system(problem, episode.support, point, solution),
        "P": partial(theorems._read_off, problem, episode.support),
    }
    corner = solution + torch.cat([torch.ones(5), 0.4 * torch.ones(5)])
    system, read_off = theorems._inner_lipschitz(problem, episode.support, corner, solution)
    constants = {"b": theorems._outer_lipschitz(problem, episode.query, corner, solution), "H": system, "P": read_off}
    reached = dict.fromkeys(constants, 0.0)
    for index in range(200):
        fraction = torch.rand(2, 10, generator=generator, dtype=torch.float64)
        if index % 2:  # points that differ in one coordinate only, near the upper corner of the box
            fraction = torch.ones(2, 10, dtype=torch.float64)
            fraction[1, index // 2 % 10] = 0.99
        first, second = solution + fraction * (corner - solution)
        for name, function in functions.items():
            change = function(first) - function(second)
            norm = change.norm() if change.ndim == 1 else torch.linalg.matrix_norm(change, ord=2)
            ratio = float(norm / (first - second).norm() / constants[name])
            assert ratio <= 1 + 1e-9, name
            reached[name] = max(reached[name], ratio)
    assert reached["H"] > 0.9
    assert reached["P"] > 0.3
    assert reached["b"] > 0.3
