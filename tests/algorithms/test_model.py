"""A network as a pure function: how its parameters are split, and that nothing else changes."""

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibaml import tree
from ibaml.algorithms.kernels import kernels_of
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Categorical, Gaussian
from ibaml.networks import Conv4
from ibaml.solvers import curvature
from ibaml.types import Batch, Params, Tensor

ALGEBRA = 1e-10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a network float64 parameters that do not depend on the global seed."""
    network = network.double()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed + index))
    return network


def small_network() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)))


ALL = {"0.weight", "0.bias", "2.weight", "2.bias"}


def names(model: Model) -> tuple[set[str], set[str], set[str]]:
    return set(model.adapted), set(model.shared), set(model.frozen)


@pytest.mark.parametrize(
    ("adapt", "freeze", "adapted", "frozen"),
    [
        ("*", (), ALL, set()),
        ("2.*", (), {"2.weight", "2.bias"}, set()),
        (["0.weight", "2.*"], (), {"0.weight", "2.weight", "2.bias"}, set()),
        ("*.bias", "0.weight", {"0.bias", "2.bias"}, {"0.weight"}),
        ("*", ["0.*"], {"2.weight", "2.bias"}, {"0.weight", "0.bias"}),
    ],
)
def test_patterns_split_the_parameters(
    adapt: str | list[str], freeze: str | list[str], adapted: set[str], frozen: set[str]
) -> None:
    model = build_model(small_network(), Categorical(), adapt=adapt, freeze=freeze)
    assert names(model) == (adapted, ALL - adapted - frozen, frozen)


def test_parameters_without_gradient_are_frozen() -> None:
    network = small_network()
    network[0].weight.requires_grad_(False)
    model = build_model(network, Categorical())
    assert names(model) == (ALL - {"0.weight"}, set(), {"0.weight"})


def test_likelihood_parameters_are_shared() -> None:
    model = build_model(small_network(), Gaussian(num_targets=3))
    assert set(model.shared) == {"likelihood.log_noise_variance"}


def test_values_are_copies_without_gradient() -> None:
    network = small_network()
    model = build_model(network, Categorical(), adapt="2.*", freeze="0.bias")
    for name, parameter in network.named_parameters():
        value = {**model.adapted, **model.shared, **model.frozen}[name]
        assert torch.equal(value, parameter)
        assert value.data_ptr() != parameter.data_ptr()
        assert not value.requires_grad


@pytest.mark.parametrize(
    ("argument", "pattern", "nearest"),
    [("adapt", "2.wieght", "2.weight"), ("freeze", "0.bais", "0.bias"), ("adapt", "head.*", None)],
)
def test_pattern_without_a_match_is_refused_and_names_the_nearest(
    argument: str, pattern: str, nearest: str | None
) -> None:
    message = re.escape(f"{argument} pattern '{pattern}' matches none of the parameters ['0.bias', ")
    with pytest.raises(ValueError, match=message) as error:
        build_model(small_network(), Categorical(), **{argument: pattern})
    if nearest:
        assert str(error.value).endswith(f"Did you mean '{nearest}'?")
    assert all(name in str(error.value) for name in ALL)


def test_nothing_left_to_adapt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapt='2\.\*' and freeze='\*' leave no parameter to adapt, out of"):
        build_model(small_network(), Categorical(), adapt="2.*", freeze="*")


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_running_statistics_are_refused_with_the_name_of_the_layer(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"network has running statistics in 1\.0 \({type(layer).__name__}\)"):
        build_model(network, Categorical())


def test_running_statistics_of_the_network_itself_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network has running statistics in its root \(BatchNorm1d\)"):
        build_model(nn.BatchNorm1d(3), Categorical())


def test_batch_statistics_are_accepted_and_used() -> None:
    layer = nn.BatchNorm1d(2, track_running_stats=False).double()
    model = build_model(layer, Categorical())
    x = draw(8, 2)
    outputs = model.outputs(model.adapted, model.shared, x)
    oracle = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
    torch.testing.assert_close(outputs, oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_outputs_equal_the_networks_forward_at_any_parameters() -> None:
    network, other, x = small_network(), fill(small_network(), seed=30), draw(5, 2)
    model = build_model(network, Categorical(), adapt="2.*", freeze="0.bias")
    torch.testing.assert_close(
        model.outputs(model.adapted, model.shared, x), network(x), rtol=ALGEBRA, atol=ALGEBRA, check_dtype=True
    )
    mixed = copy.deepcopy(network)
    with torch.no_grad():
        mixed[2].weight.copy_(other[2].weight)
        mixed[2].bias.copy_(other[2].bias)
        mixed[0].weight.copy_(other[0].weight)
    values = {name: parameter.detach() for name, parameter in other.named_parameters()}
    adapted, shared = ({name: values[name] for name in group} for group in (model.adapted, model.shared))
    outputs = model.outputs(adapted, shared, x)
    torch.testing.assert_close(outputs, mixed(x).detach(), rtol=ALGEBRA, atol=ALGEBRA)


def test_nll_is_the_likelihood_of_the_outputs() -> None:
    network, batch = small_network(), Batch(draw(5, 2), torch.tensor([0, 1, 2, 0, 1]))
    model = build_model(network, Categorical())
    oracle = nn.functional.cross_entropy(network(batch.x), batch.y, reduction="none").detach()
    torch.testing.assert_close(
        model.per_example(model.adapted, model.shared, batch), oracle, rtol=ALGEBRA, atol=ALGEBRA
    )


def test_nll_reads_the_noise_from_the_shared_parameters() -> None:
    network, batch = small_network(), Batch(draw(5, 2), draw(5, 3, seed=1))
    model = build_model(network, Gaussian(num_targets=3))
    shared = {"likelihood.log_noise_variance": torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)}
    normal = torch.distributions.Normal(network(batch.x), (0.5 * shared["likelihood.log_noise_variance"]).exp())
    oracle = -normal.log_prob(batch.y).sum(-1).detach()
    torch.testing.assert_close(model.per_example(model.adapted, shared, batch), oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_network_parameters_and_gradients_are_left_alone() -> None:
    network, batch = small_network(), Batch(draw(5, 2), torch.tensor([0, 1, 2, 0, 1]))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    model = build_model(network, Categorical(), adapt="2.*", freeze="0.bias")

    def loss(adapted: Params) -> Tensor:
        return model.per_example(adapted, model.shared, batch).mean()

    moved = tree.axpy(-1.0, torch.func.grad(loss)(model.adapted), model.adapted)
    curvature.hvp(loss, moved)(moved)
    for value in model.adapted.values():
        value.add_(1.0)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_dropout_is_switched_off() -> None:
    network = fill(nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 3)))
    network.train()
    model = build_model(network, Categorical())
    x = draw(4, 2)
    oracle = network[2](network[0](x)).detach()
    torch.testing.assert_close(model.outputs(model.adapted, model.shared, x), oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_tied_parameters_stay_tied() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    network[1].weight = network[0].weight
    model = build_model(network.double(), Categorical())
    assert set(model.adapted) == {"0.weight"}
    matrix, x = draw(2, 2), draw(3, 2, seed=1)
    outputs = model.outputs({"0.weight": matrix}, model.shared, x)
    torch.testing.assert_close(outputs, x @ matrix.T @ matrix.T, rtol=ALGEBRA, atol=ALGEBRA)


def test_buffers_are_used() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.linear(x)

    network, x = fill(Scaled()), draw(3, 2)
    model = build_model(network, Categorical())
    torch.testing.assert_close(
        model.outputs(model.adapted, model.shared, x), 3 * network.linear(x).detach(), rtol=ALGEBRA, atol=ALGEBRA
    )


def test_submodule_called_likelihood_is_adapted_or_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.likelihood = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.likelihood(x)

    try:
        model = build_model(fill(Named()), Categorical())
    except ValueError as error:
        assert "likelihood." in str(error)
    else:
        zero = tree.zeros_like(model.adapted)
        assert torch.equal(model.outputs(zero, model.shared, draw(3, 2)), torch.zeros(3, 2).double())


def test_to_keeps_every_value() -> None:
    model = build_model(small_network(), Gaussian(num_targets=3), adapt="2.*", freeze="0.bias")
    moved = model.to(torch.device("cpu"))
    assert names(moved) == names(model)
    for group, other in ((model.adapted, moved.adapted), (model.shared, moved.shared), (model.frozen, moved.frozen)):
        assert all(torch.equal(value, other[name]) for name, value in group.items())


class Attention(nn.Module):
    """Self-attention and a linear head, as a user may write it."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=self.need_weights)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu", norm_first=norm_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = layer(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class OwnAttention(nn.Module):
    """Attention by torch's function, without a layer of torch that would tell of it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.scaled_dot_product_attention(*self.project(x).chunk(3, -1)).mean(1))


FUSED_ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(False),
    "encoder": lambda: Encoder(False),
    "encoder, norm first": lambda: Encoder(True),
}
SEQUENCE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "attention with weights": lambda: Attention(True),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention of one's own": OwnAttention,
    **FUSED_ATTENTION,
}
SEQUENCES = Batch(draw(6, 5, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


def sequence_model(build: Callable[[], nn.Module]) -> tuple[Model, Callable[[Params], Tensor], Params]:
    model = build_model(fill(build()), Categorical())
    direction = {name: draw(*value.shape, seed=70 + index) for index, (name, value) in enumerate(model.adapted.items())}

    def loss(adapted: Params) -> Tensor:
        return model.per_example(adapted, model.shared, SEQUENCES).mean()

    return model, loss, direction


def central_difference(loss: Callable[[Params], Tensor], at: Params, direction: Params) -> Params:
    step = 1e-5
    ahead, behind = (torch.func.grad(loss)(tree.axpy(sign * step, direction, at)) for sign in (1, -1))
    return tree.scale(1 / (2 * step), tree.sub(ahead, behind))


every_sequence_network = pytest.mark.parametrize("build", SEQUENCE_NETWORKS.values(), ids=SEQUENCE_NETWORKS.keys())


@every_sequence_network
def test_sequence_networks_give_their_own_outputs(build: Callable[[], nn.Module]) -> None:
    model, _, _ = sequence_model(build)
    oracle = model.network(SEQUENCES.x).detach()
    torch.testing.assert_close(
        model.outputs(model.adapted, model.shared, SEQUENCES.x).detach(), oracle, rtol=ALGEBRA, atol=ALGEBRA
    )


@every_sequence_network
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_sequence_networks_have_hessian_vector_products(build: Callable[[], nn.Module], mode: str) -> None:
    model, loss, direction = sequence_model(build)
    product = curvature.hvp(loss, model.adapted, mode=mode)(direction)
    oracle = central_difference(loss, model.adapted, direction)
    for name in oracle:
        torch.testing.assert_close(product[name], oracle[name], rtol=1e-6, atol=1e-7)


@every_sequence_network
def test_sequence_networks_have_hessian_vector_products_under_vmap(build: Callable[[], nn.Module]) -> None:
    model, loss, direction = sequence_model(build)
    points = tree.map(lambda value: torch.stack([value, 1.1 * value]), model.adapted)
    with warnings.catch_warnings():
        # Slower fallbacks of single operations are torch's own business.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        products = torch.func.vmap(lambda p: curvature.hvp(loss, p)(direction))(points)
    for index in range(2):
        oracle = central_difference(loss, {name: value[index] for name, value in points.items()}, direction)
        for name in oracle:
            torch.testing.assert_close(products[name][index], oracle[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("build", FUSED_ATTENTION.values(), ids=FUSED_ATTENTION.keys())
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_attention_has_hessian_vector_products_with_the_math_kernel(build: Callable[[], nn.Module], mode: str) -> None:
    model, loss, direction = sequence_model(build)
    with sdpa_kernel(SDPBackend.MATH):
        product = curvature.hvp(loss, model.adapted, mode=mode)(direction)
        oracle = central_difference(loss, model.adapted, direction)
    for name in oracle:
        torch.testing.assert_close(product[name], oracle[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("build", FUSED_ATTENTION.values(), ids=FUSED_ATTENTION.keys())
def test_attention_changes_no_flag_of_the_process(build: Callable[[], nn.Module]) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        model, loss, direction = sequence_model(build)
        product = curvature.hvp(loss, model.adapted)(direction)
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    oracle = central_difference(loss, model.adapted, direction)
    for name in oracle:
        torch.testing.assert_close(product[name], oracle[name], rtol=1e-6, atol=1e-7)


def test_kernels_are_switched_where_a_network_may_call_them_alone() -> None:
    assert kernels_of(Conv4(5, channels=4, image_size=8))[:3] == (False, False, False)
    assert kernels_of(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))[:3] == (False, False, False)
    assert kernels_of(OwnAttention())[:3] == (True, False, False)
    assert kernels_of(nn.Sequential(nn.MultiheadAttention(4, 2)))[:3] == (True, True, False)
    assert kernels_of(nn.Sequential(nn.GRU(4, 5)))[:3] == (False, False, True)


def test_a_parameter_of_two_names_has_one_value() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert not kernels_of(network).ties
    network[2].weight = network[0].weight
    assert kernels_of(network).ties
    model = build_model(network, Categorical())
    changed = {name: value + 1 for name, value in model.adapted.items()}
    found = model.outputs(changed, {}, torch.eye(2))
    hidden = torch.tanh(torch.eye(2) @ changed["0.weight"].mT + changed["0.bias"])
    torch.testing.assert_close(found, hidden @ changed["0.weight"].mT + changed["2.bias"])
