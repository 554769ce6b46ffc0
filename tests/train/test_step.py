"""The fast way to compute meta-gradients equals the plain one, for every algorithm and kind of network."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Categorical, Gaussian, Likelihood
from ibaml.networks import MLP, Conv4, ResNet12
from ibaml.priors import DiagonalPrior
from ibaml.solvers.inner import Adam, GradientDescent, NaturalGradient
from ibaml.train.step import HypergradientStep, TaskHypergradients
from ibaml.types import Batch, Episode, Tensor

NUM_TASKS = 3
BAYESIAN = {"num_samples": 2, "prior": DiagonalPrior(initial_log_var=(-4.0, -3.0)), "temperature": 0.1}
# Exact Bayes' temperature would hide the curvature of the nll behind that of the prior.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "maml": ("maml", {}),
    "truncated maml": ("maml", {"truncation": 1}),
    "maml with adam": ("maml", {"inner": Adam(num_steps=3)}),
    "fomaml": ("fomaml", {}),
    "imaml": ("imaml", {}),
    "abml": ("abml", BAYESIAN),
    "vampire": ("vampire", BAYESIAN),
    "ibaml": ("ibaml", BAYESIAN),
    "ibaml with abml's outer loss": ("ibaml", {**BAYESIAN, "outer": "elbo", "hyper_prior_weight": 0.01}),
    "ibaml with predictive nll": ("ibaml", {**BAYESIAN, "outer": "predictive_nll"}),
    "ibaml with natural gradient": ("ibaml", {**BAYESIAN, "inner": NaturalGradient(num_steps=3, learning_rate=0.01)}),
}


def image_problem(network: nn.Module, size: int) -> tuple[Model, Episode]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(6).expand(NUM_TASKS, 6) % 3
    support, query = (
        Batch(torch.randn(NUM_TASKS, 6, 1, size, size, generator=generator, dtype=torch.float64), labels)
        for _ in range(2)
    )
    return build_model(network.double(), Categorical()), Episode(support, query)


def regression_problem() -> tuple[Model, Episode]:
    generator = torch.Generator().manual_seed(1)
    support, query = (
        Batch(*(torch.randn(NUM_TASKS, 5, width, generator=generator, dtype=torch.float64) for width in (3, 2)))
        for _ in range(2)
    )
    network = MLP(2, input_shape=3, hidden_sizes=(6,), generator=torch.Generator().manual_seed(0))
    return build_model(network.double(), _double_noise()), Episode(support, query)


def _double_noise() -> Likelihood:
    class Double(Gaussian):
        def initial_parameters(self) -> dict[str, Tensor]:
            return {name: value.double() for name, value in super().initial_parameters().items()}

    return Double(num_targets=2)


def conv_problem(**settings: Any) -> tuple[Model, Episode]:
    network = Conv4(3, image_size=8, channels=4, generator=torch.Generator().manual_seed(0), **settings)
    return image_problem(network, 8)


def one_block_problem() -> tuple[Model, Episode]:
    """A quarter of a Conv4, whose programs take a quarter of the time to write."""
    torch.manual_seed(0)
    block = nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU()
    return image_problem(nn.Sequential(*block, nn.Flatten(), nn.Linear(16, 3)), 5)


def start(model: Model, algorithm: Algorithm) -> tuple[MetaParameters, list[TaskNoise]]:
    generator = torch.Generator().manual_seed(2)
    meta = algorithm.init(model.adapted, model.shared, generator=generator)
    return meta, [algorithm.draw_noise(meta, generator=generator) for _ in range(NUM_TASKS)]


def assert_equal(fast: TaskHypergradients, plain: TaskHypergradients, tolerance: float = 1e-10) -> None:
    scale = float(tree.norm(plain.total))
    assert float(tree.norm(tree.sub(fast.total, plain.total))) < tolerance * scale
    # A matrix product rounds by its size, so that squared errors of many tasks at once may be a bit apart.
    torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-12, atol=0)
    for field in ("outer_loss", "inner_grad_norm"):
        torch.testing.assert_close(
            getattr(fast.info, field), getattr(plain.info, field), rtol=1e-10, atol=1e-10, msg=field
        )
    assert fast.info.linear_converged.tolist() == plain.info.linear_converged.tolist()


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        *((regression_problem, name) for name in ALGORITHMS),
        *((conv_problem, name) for name in ("maml", "imaml", "abml", "ibaml with abml's outer loss")),
    ],
)
def test_fast_gradients_equal_plain_ones(problem: Any, name: str) -> None:
    model, episodes = problem()
    algorithm = make_algorithm(ALGORITHMS[name][0], **{"inner": GradientDescent(num_steps=3), **ALGORITHMS[name][1]})
    meta, noises = start(model, algorithm)
    fast = HypergradientStep(model, algorithm, programs=True)(meta, episodes, noises)
    plain = HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises)
    assert float(tree.norm(plain.total)) > 1e-3
    # Conjugate gradients magnify rounding, as does Adam's division by small gradients.
    magnifies = algorithm.estimator == "implicit" or isinstance(algorithm.inner, Adam)
    assert_equal(fast, plain, tolerance=1e-8 if magnifies else 1e-12)


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (Conv4(3, image_size=8, channels=4, downsample="stride", generator=torch.Generator().manual_seed(0)), 8),
        (Conv4(3, image_size=8, channels=4, norm="group", generator=torch.Generator().manual_seed(0)), 8),
        (
            ResNet12(3, in_channels=1, image_size=16, widths=(2, 3, 4, 5), generator=torch.Generator().manual_seed(0)),
            16,
        ),
    ],
    ids=["strides", "group normalisation", "resnet12"],
)
def test_other_networks(network: nn.Module, size: int) -> None:
    model, episodes = image_problem(network, size)
    algorithm = make_algorithm("ibaml", inner=GradientDescent(num_steps=2), **BAYESIAN)
    meta, noises = start(model, algorithm)
    fast = HypergradientStep(model, algorithm, programs=True)(meta, episodes, noises)
    assert_equal(fast, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)


@pytest.mark.parametrize("tasks_per_chunk", [1, 2, NUM_TASKS])
@pytest.mark.parametrize("programs", [True, False])
def test_chunks_do_not_matter(tasks_per_chunk: int, programs: bool) -> None:
    model, episodes = regression_problem()
    algorithm = make_algorithm("ibaml", inner=GradientDescent(num_steps=3), **BAYESIAN)
    meta, noises = start(model, algorithm)
    chunked = HypergradientStep(model, algorithm, tasks_per_chunk=tasks_per_chunk, programs=programs)(
        meta, episodes, noises
    )
    assert_equal(chunked, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)


@pytest.mark.parametrize("name", ["maml", "imaml", "abml", "ibaml"])
def test_large_networks_without_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibaml.algorithms.model._LARGEST_SMALL", 0)
    model, episodes = regression_problem()
    algorithm = make_algorithm(name, inner=GradientDescent(num_steps=2), **ALGORITHMS[name][1])
    meta, noises = start(model, algorithm)
    found = HypergradientStep(model, algorithm)(meta, episodes, noises)
    assert_equal(found, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)


@pytest.mark.parametrize("fast", [True, False])
def test_scores_can_be_left_out(fast: bool) -> None:
    model, episodes = regression_problem()
    algorithm = make_algorithm("ibaml", inner=GradientDescent(num_steps=2), **BAYESIAN)
    meta, noises = start(model, algorithm)
    compute = HypergradientStep(model, algorithm, fast=fast, programs=True)
    without = compute(meta, episodes, noises, with_scores=False)
    assert without.scores.isnan().all() and without.scores.shape == (NUM_TASKS,)
    assert without.info.inner_grad_norm.shape == (NUM_TASKS,)
    torch.testing.assert_close(without.total, compute(meta, episodes, noises).total, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("problem", "num_written"), [(regression_problem, 0), (conv_problem, 1)])
def test_programs_are_written_for_convolutions_only(
    problem: Any, num_written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ibaml.fast import derivatives

    written: list[Any] = []
    write = derivatives.trace_gradient
    monkeypatch.setattr(derivatives, "trace_gradient", lambda *a, **k: written.append(a) or write(*a, **k))
    model, episodes = problem()
    algorithm = make_algorithm("fomaml")
    meta, noises = start(model, algorithm)
    for programs in (False, None):
        HypergradientStep(model, algorithm, programs=programs)(meta, episodes, noises)
        assert len(written) == (num_written if programs is None else 0)


class Branching(nn.Module):
    """Control flow that depends on values cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.linear(x)
        return outputs if bool(outputs.sum() > 0) else -outputs


def test_a_network_that_cannot_be_traced_is_differentiated_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = Batch(torch.randn(1, 5, 3, generator=generator, dtype=torch.float64), torch.tensor([[0, 1, 0, 1, 1]]))
    torch.manual_seed(0)
    model = build_model(Branching().double(), Categorical())
    algorithm = make_algorithm("maml", inner=GradientDescent(num_steps=2))
    meta, noises = start(model, algorithm)
    with caplog.at_level(logging.WARNING):
        fast = HypergradientStep(model, algorithm, programs=True)(meta, Episode(batch, batch), noises[:1])
    assert "Branching is differentiated step by step" in caplog.text
    assert_equal(fast, HypergradientStep(model, algorithm, fast=False)(meta, Episode(batch, batch), noises[:1]))


def test_shared_network_parameters_are_learned_all_the_same() -> None:
    _, episodes = conv_problem()
    network = Conv4(3, image_size=8, channels=4, generator=torch.Generator().manual_seed(0)).double()
    model = build_model(network, Categorical(), adapt="head.*")
    algorithm = make_algorithm("ibaml", inner=GradientDescent(num_steps=2), **BAYESIAN)
    meta, noises = start(model, algorithm)
    fast = HypergradientStep(model, algorithm, programs=True)(meta, episodes, noises)
    assert float(tree.norm(fast.total.shared)) > 1e-3
    assert_equal(fast, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)


@pytest.mark.parametrize("name", ["maml", "ibaml", "ibaml with abml's outer loss"])
def test_passing_examples_in_parts_gives_the_same_gradients(name: str) -> None:
    model, episodes = one_block_problem()
    algorithm = make_algorithm(ALGORITHMS[name][0], **{"inner": GradientDescent(num_steps=2), **ALGORITHMS[name][1]})
    meta, noises = start(model, algorithm)
    in_parts = HypergradientStep(model, algorithm, max_examples_per_pass=4)(meta, episodes, noises)
    assert_equal(in_parts, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)


def test_parts_that_cannot_be_are_refused() -> None:
    algorithm = make_algorithm("maml")
    batch_norm, group_norm = (conv_problem(norm=norm)[0] for norm in ("batch", "group"))
    with pytest.raises(ValueError, match=r"max_examples_per_pass is 4, but features\.1 \(BatchNorm2d\) normalises all"):
        HypergradientStep(batch_norm, algorithm, max_examples_per_pass=4)
    with pytest.raises(ValueError, match="max_examples_per_pass must be at least 1 or None, but is 0"):
        HypergradientStep(group_norm, algorithm, max_examples_per_pass=0)
    with pytest.raises(ValueError, match="max_examples_per_pass needs fast=True"):
        HypergradientStep(group_norm, algorithm, max_examples_per_pass=4, fast=False)


def test_compiled_programs_give_the_same_gradients() -> None:
    model, episodes = regression_problem()
    algorithm = make_algorithm("ibaml", inner=GradientDescent(num_steps=2), **BAYESIAN)
    meta, noises = start(model, algorithm)
    compiled = HypergradientStep(model, algorithm, programs=True, compile=True)(meta, episodes, noises)
    assert_equal(compiled, HypergradientStep(model, algorithm, fast=False)(meta, episodes, noises), tolerance=1e-8)
