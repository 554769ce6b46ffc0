"""Likelihoods against torch.nn.functional and torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ibaml.likelihoods import Categorical, Gaussian, UnitGaussian, make_likelihood
from ibaml.types import Tensor

ALGEBRA = 1e-10

seeds = st.integers(0, 2**20)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def noise_parameters(*log_variances: float) -> dict[str, Tensor]:
    return {Gaussian.parameter_name: torch.tensor(log_variances, dtype=torch.float64)}


@settings(deadline=None, max_examples=30)
@given(seed=seeds, num_classes=st.integers(1, 8), scale=st.sampled_from([1.0, 100.0]))
def test_categorical_equals_torch_cross_entropy(seed: int, num_classes: int, scale: float) -> None:
    logits, targets = scale * draw(7, num_classes, seed=seed), labels(7, num_classes=num_classes, seed=seed)
    oracle = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(Categorical().nll(logits, targets, {}), oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_categorical_keeps_leading_axes() -> None:
    logits, targets = draw(3, 2, 5, 4), labels(3, 2, 5, num_classes=4)
    nll = Categorical().nll(logits, targets, {})
    assert nll.shape == (3, 2, 5)
    oracle = torch.nn.functional.cross_entropy(logits.reshape(-1, 4), targets.reshape(-1), reduction="none")
    torch.testing.assert_close(nll.reshape(-1), oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_categorical_under_vmap_equals_the_loop_with_its_derivatives() -> None:
    logits, targets = draw(3, 5, 4), labels(3, 5, num_classes=4)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return Categorical().nll(f, y, {}).sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(logits, targets)
    oracle = logits.softmax(-1) - torch.nn.functional.one_hot(targets, 4)
    torch.testing.assert_close(gradients, oracle, rtol=ALGEBRA, atol=ALGEBRA)
    values = torch.func.vmap(loss)(logits, targets)
    for value, f, y in zip(values, logits, targets, strict=True):
        torch.testing.assert_close(value, loss(f, y), rtol=ALGEBRA, atol=ALGEBRA)


def test_categorical_hessian_is_that_of_the_softmax() -> None:
    logits = draw(4)
    hessian = torch.func.hessian(lambda f: Categorical().nll(f[None], torch.tensor([2]), {}).sum())(logits)
    probs = logits.softmax(-1)
    torch.testing.assert_close(hessian, torch.diag(probs) - torch.outer(probs, probs), rtol=ALGEBRA, atol=ALGEBRA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_categorical_computes_half_precision_logits_in_float32(dtype: torch.dtype) -> None:
    # The nll of the first is log(1 + exp(-4)), of which 16 bits keep three digits.
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).to(dtype)
    nll = Categorical().nll(logits, torch.tensor([0, 0]), {})
    assert nll.dtype == torch.float32
    oracle = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(nll.double(), oracle, rtol=1e-5, atol=0)


def test_categorical_gives_an_impossible_class_no_say_in_the_others() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64)
    oracle = torch.nn.functional.cross_entropy(logits, torch.tensor([0]), reduction="none")
    torch.testing.assert_close(Categorical().nll(logits, torch.tensor([0]), {}), oracle, rtol=ALGEBRA, atol=0)


def test_categorical_has_no_parameters() -> None:
    assert Categorical().initial_parameters() == {}


@settings(deadline=None, max_examples=30)
@given(seed=seeds, num_outputs=st.integers(1, 4))
def test_gaussian_noise_equals_torch_normal(seed: int, num_outputs: int) -> None:
    outputs, targets = draw(6, num_outputs, seed=seed), draw(6, num_outputs, seed=seed + 1)
    log_variance = draw(num_outputs, seed=seed + 2)
    likelihood = Gaussian(num_targets=num_outputs)
    nll = likelihood.nll(outputs, targets, {likelihood.parameter_name: log_variance})
    oracle = -Normal(outputs, (0.5 * log_variance).exp()).log_prob(targets).sum(-1)
    torch.testing.assert_close(nll, oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_unit_gaussian_noise_is_gaussian_noise_of_variance_one_with_nothing_to_learn() -> None:
    outputs, targets, likelihood = draw(6, 2), draw(6, 2, seed=1), make_likelihood("unit_gaussian", 2)
    assert isinstance(likelihood, UnitGaussian)
    assert likelihood.initial_parameters() == {}
    oracle = -Normal(outputs, torch.ones(2, dtype=torch.float64)).log_prob(targets).sum(-1)
    torch.testing.assert_close(likelihood.nll(outputs, targets, {}), oracle, rtol=ALGEBRA, atol=ALGEBRA)
    prediction = likelihood.predict(torch.stack([outputs, outputs]), {})
    torch.testing.assert_close(prediction.total_uncertainty, torch.ones_like(outputs), rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(prediction.mean, outputs, rtol=ALGEBRA, atol=ALGEBRA)


def test_gaussian_noise_under_vmap_equals_the_loop() -> None:
    outputs, targets, likelihood = draw(3, 5, 2), draw(3, 5, 2, seed=1), Gaussian(num_targets=2)
    parameters = noise_parameters(0.3, -0.5)
    batched = torch.func.vmap(lambda f, y: likelihood.nll(f, y, parameters))(outputs, targets)
    assert batched.shape == (3, 5)
    for row, f, y in zip(batched, outputs, targets, strict=True):
        torch.testing.assert_close(row, likelihood.nll(f, y, parameters), rtol=ALGEBRA, atol=ALGEBRA)


def test_gaussian_noise_gradient_in_the_log_variance_is_its_closed_form() -> None:
    outputs, targets = draw(6, 1), draw(6, 1, seed=1)
    gradient = torch.func.grad(lambda p: Gaussian().nll(outputs, targets, p).sum())(noise_parameters(0.4))
    squared = ((targets - outputs) ** 2).sum()
    oracle = 0.5 * (6 - squared * math.exp(-0.4))
    torch.testing.assert_close(gradient[Gaussian.parameter_name][0], oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_gaussian_noise_starts_at_its_variance() -> None:
    parameters = Gaussian(num_targets=3, initial_noise_variance=0.25).initial_parameters()
    assert parameters.keys() == {"likelihood.log_noise_variance"}
    torch.testing.assert_close(parameters["likelihood.log_noise_variance"].exp(), torch.full((3,), 0.25))


def test_gaussian_noise_of_half_precision_outputs_does_not_overflow() -> None:
    # 300^2 is beyond the largest float16.
    outputs, targets = torch.zeros(1, 1, dtype=torch.float16), torch.full((1, 1), 300.0, dtype=torch.float16)
    nll = Gaussian().nll(outputs, targets, {Gaussian.parameter_name: torch.zeros(1)})
    oracle = -Normal(0.0, 1.0).log_prob(torch.tensor([300.0]))
    torch.testing.assert_close(nll, oracle)


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_gaussian_noise_refuses_a_variance_that_is_not_positive(variance: float) -> None:
    with pytest.raises(ValueError, match=f"initial_noise_variance must be positive and finite, but is {variance}."):
        Gaussian(num_targets=1, initial_noise_variance=variance)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((5, 1), (5,)), ((5, 2), (5, 1))], ids=["missing axis", "fewer outputs"]
)
def test_gaussian_noise_refuses_targets_of_another_shape(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    # Broadcasting would compare every output with every target and return a number that looks sound.
    with pytest.raises(ValueError, match="targets"):
        Gaussian(num_targets=outputs[-1]).nll(draw(*outputs), draw(*targets), noise_parameters(*[0.0] * outputs[-1]))


def test_likelihoods_are_found_by_their_names() -> None:
    categorical, gaussian = make_likelihood("categorical", 5), make_likelihood("gaussian", 2)
    assert isinstance(categorical, Categorical) and categorical.name == "categorical"
    assert isinstance(gaussian, Gaussian) and gaussian.name == "gaussian"
    assert gaussian.initial_parameters()[Gaussian.parameter_name].shape == (2,)


def test_unknown_likelihood_is_refused() -> None:
    with pytest.raises(ValueError, match="likelihood must be one of categorical, gaussian, .* but is 'cauchy'."):
        make_likelihood("cauchy", 1)
