"""The one-file implementation as an oracle: it shares no line with the library and has to give the same numbers."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.priors import DiagonalColumnPrior, DiagonalGaussian, DiagonalPrior, kl_divergence
from ibaml.priors.columns import DiagonalColumns
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NOISE_VARIANCE = 0.2


class Problem(NamedTuple):
    """The same task for the library (algorithm, model, meta, episode, noise) and for the example (the rest)."""

    algorithm: Algorithm
    model: Model
    meta: MetaParameters
    episode: Episode
    noise: TaskNoise
    settings: Any
    prior: Tensor
    flat_noise: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def scratch(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("ibaml_from_scratch")


def flat(weights: Params, *, leading: int = 0) -> Tensor:
    return torch.cat([leaf.flatten(leading) for leaf in weights.values()], dim=-1)


def flat_gaussian(gaussian: DiagonalGaussian) -> Tensor:
    return torch.stack([flat(gaussian.mean), flat(gaussian.log_var)])


def make_problem(
    scratch: ModuleType, *, seed: int, sizes: tuple[int, ...], temperature: float, **counts: int
) -> Problem:
    source = torch.Generator().manual_seed(seed)
    settings = scratch.Settings(
        sizes=sizes, noise_variance=NOISE_VARIANCE, inner_rate=0.01, momentum=0.6, temperature=temperature, **counts
    )
    algorithm = make_algorithm(
        "ibaml",
        inner=GradientDescent(
            num_steps=settings.num_inner_steps, learning_rate=settings.inner_rate, momentum=settings.momentum
        ),
        linear=CG(max_steps=settings.num_linear_steps, rtol=0.0),
        temperature=temperature,
        num_samples=3,
        prior=DiagonalPrior(initial_log_var=(-5.0, -3.0)),
    )
    network = MLP(1, input_shape=sizes[0], hidden_sizes=sizes[1:-1], activation="tanh", generator=source).double()
    model = build_model(network, Gaussian(num_targets=1, initial_noise_variance=NOISE_VARIANCE))
    # The likelihood keeps its variance in float32.
    log_noise = torch.tensor([NOISE_VARIANCE], dtype=DOUBLE).log()
    meta = algorithm.init(model.adapted, {Gaussian.parameter_name: log_noise}, generator=source)

    def batch(size: int) -> Batch:
        x = torch.randn(size, sizes[0], generator=source, dtype=DOUBLE)
        return Batch(x, torch.sin(x.sum(-1, keepdim=True)))

    noise = algorithm.draw_noise(meta, generator=source)
    assert isinstance(meta.prior, DiagonalGaussian)
    return Problem(
        algorithm=algorithm,
        model=model,
        meta=meta,
        episode=Episode(batch(6), batch(8)),
        noise=noise,
        settings=settings,
        prior=flat_gaussian(meta.prior),
        flat_noise=(flat(noise.inner, leading=1), flat(noise.outer, leading=1)),
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("sizes", [(2, 5, 4, 1), (3, 1)])
@pytest.mark.parametrize(("num_inner_steps", "num_linear_steps"), [(1, 1), (7, 2), (60, 5)])
def test_hypergradient_is_that_of_the_library(scratch, seed, temperature, sizes, num_inner_steps, num_linear_steps):
    counts = {"num_inner_steps": num_inner_steps, "num_linear_steps": num_linear_steps}
    problem = make_problem(scratch, seed=seed, sizes=sizes, temperature=temperature, **counts)
    expected, info = problem.algorithm.hypergradient(problem.model, problem.meta, problem.episode, problem.noise)
    gradient, outer_loss, residual = scratch.hypergradient(
        problem.prior, *problem.episode, *problem.flat_noise, problem.settings
    )
    assert gradient.norm() > 1e-4
    torch.testing.assert_close(gradient, flat_gaussian(expected.prior), rtol=1e-8, atol=1e-8 * float(gradient.norm()))
    torch.testing.assert_close(outer_loss, info.outer_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(residual, info.linear_residual, rtol=1e-6, atol=1e-12)


def test_hypergradient_under_vmap_is_that_of_each_task(scratch):
    problems = [make_problem(scratch, seed=s, sizes=(2, 5, 1), temperature=0.3) for s in range(3)]
    episode = tree.map(lambda *leaves: torch.stack(leaves), *[p.episode for p in problems])
    noise = [torch.stack(draws) for draws in zip(*[p.flat_noise for p in problems], strict=True)]
    prior, settings = problems[0].prior, problems[0].settings
    together = torch.func.vmap(lambda *task: scratch.hypergradient(prior, *task, settings)[0])(*episode, *noise)
    for problem, gradient in zip(problems, together, strict=True):
        alone, _, _ = scratch.hypergradient(prior, *problem.episode, *problem.flat_noise, settings)
        torch.testing.assert_close(gradient, alone, rtol=1e-8, atol=1e-8 * float(alone.norm()))


def test_inner_trajectory_is_that_of_the_library(scratch):
    for num_steps in (1, 2, 5, 30):
        problem = make_problem(scratch, seed=3, sizes=(2, 5, 4, 1), temperature=0.5, num_inner_steps=num_steps)
        expected = problem.algorithm.adapt(problem.model, problem.meta, problem.episode.support, problem.noise).value
        assert isinstance(expected, DiagonalGaussian)
        adapted = scratch.adapt(problem.prior, problem.episode.support, problem.flat_noise[0], problem.settings)
        assert (adapted - problem.prior).norm() > 1e-3
        torch.testing.assert_close(adapted, flat_gaussian(expected), rtol=1e-12, atol=1e-12)


def test_kl_is_that_of_the_library(scratch):
    source = torch.Generator().manual_seed(0)
    mean_q, log_var_q, mean_p, log_var_p = torch.randn(4, 50, generator=source, dtype=DOUBLE)
    expected = kl_divergence(
        DiagonalGaussian({"w": mean_q}, {"w": log_var_q}), DiagonalGaussian({"w": mean_p}, {"w": log_var_p})
    )
    divergence = scratch.kl(torch.stack([mean_q, log_var_q]), torch.stack([mean_p, log_var_p]))
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=0)


def test_conjugate_gradients_solve_and_stop_at_negative_curvature(scratch):
    source = torch.Generator().manual_seed(0)
    factor, rhs = torch.randn(6, 6, generator=source, dtype=DOUBLE), torch.randn(6, generator=source, dtype=DOUBLE)
    matrix, ones = factor @ factor.T + torch.eye(6, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    u, residual = scratch.conjugate_gradients(lambda v: matrix @ v, rhs, 1 / matrix.diagonal(), 6)
    torch.testing.assert_close(u, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-8)
    assert residual < 1e-8
    u, residual = scratch.conjugate_gradients(lambda v: -matrix @ v, rhs, ones, 6)
    assert u.tolist() == [0.0] * 6
    assert residual == 1.0


class Given:
    """What a head of the library asks of a model, with features that are given."""

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return x


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_constant(x: Tensor) -> Tensor:
    """The library's heads have a constant feature as the last."""
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)


@pytest.mark.parametrize("num_support", [2, 9])
def test_linear_gaussian_head_is_that_of_the_library(scratch, num_support):
    member = DiagonalColumns(draw(1, 4, seed=0), draw(1, 4, seed=1))
    log_noise = draw(1, seed=2)
    support, query = (Batch(draw(size, 3, seed=size), draw(size, 1, seed=100 + size)) for size in (num_support, 5))
    algorithm = make_algorithm("linear_gaussian", prior=DiagonalColumnPrior(tied=False, learn_mean=True))
    meta = MetaParameters(member, {Gaussian.parameter_name: log_noise})
    expected, info = algorithm.hypergradient(Given(1), meta, Episode(support, query), TaskNoise({}, {}))

    def loss(prior: Tensor, log_noise: Tensor) -> Tensor:
        parts = [(with_constant(part.x), part.y[:, 0]) for part in (support, query)]
        return scratch.linear_gaussian_loss(prior, log_noise, *parts)

    prior = torch.cat(member)
    by_prior, by_noise = torch.func.grad(loss, argnums=(0, 1))(prior, log_noise[0])
    torch.testing.assert_close(loss(prior, log_noise[0]), info.outer_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(by_prior, torch.cat(expected.prior), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(by_noise, expected.shared[Gaussian.parameter_name][0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_support", [4, 9])
def test_softmax_head_is_that_of_the_library(scratch, num_support):
    family = DiagonalColumnPrior(tied=False, learn_mean=True)
    member = DiagonalColumns(draw(3, 4, seed=0), 2 + draw(3, 4, seed=1))
    support, query = (Batch(draw(size, 3, seed=size), torch.arange(size) % 3) for size in (num_support, 5))
    algorithm = make_algorithm("softmax", prior=family)
    meta = MetaParameters(member, {})
    expected, info = algorithm.hypergradient(Given(3), meta, Episode(support, query), TaskNoise({}, {}))
    parts = [(with_constant(part.x), part.y) for part in (support, query)]
    gradient, outer_loss = scratch.softmax_hypergradient(torch.stack(member), *parts)
    torch.testing.assert_close(outer_loss, info.outer_loss, rtol=1e-8, atol=0)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(gradient, torch.stack(expected.prior), rtol=1e-6, atol=1e-8)
    mode, _ = scratch.softmax(torch.stack(member), *parts[0])
    slope = torch.func.grad(scratch.softmax_inner_loss)(mode, torch.stack(member), *parts[0])
    assert slope.norm() < 1e-10


def test_it_imports_torch_and_the_standard_library_only(scratch):
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(scratch.__file__)).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert "torch" in names
    assert names - {"torch"} <= sys.stdlib_module_names


def test_training_lowers_the_nll(scratch, capsys):
    scratch.main(["--steps", "20"])
    before, *_, after = capsys.readouterr().out.splitlines()
    nll = [float(line.split("nll ")[1].split()[0]) for line in (before, after)]
    assert nll[1] < 0.7 * nll[0]
