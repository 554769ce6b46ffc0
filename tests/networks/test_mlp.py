import pytest
import torch

from ibaml.networks import MLP


@pytest.mark.parametrize("input_shape", [1, (7,), (1, 28, 28), ()])
@pytest.mark.parametrize("hidden_sizes", [(), (3,), (40, 40)])
def test_flattens_any_input_shape(input_shape: int | tuple[int, ...], hidden_sizes: tuple[int, ...]) -> None:
    network = MLP(2, input_shape=input_shape, hidden_sizes=hidden_sizes)
    shape = (input_shape,) if isinstance(input_shape, int) else input_shape
    assert network(torch.zeros(4, *shape)).shape == (4, 2)


@pytest.mark.parametrize(
    ("input_shape", "hidden_sizes", "norm", "expected"),
    [
        (1, (40, 40), "none", 1_761),  # 1*40 + 40, 40*40 + 40, 40 + 1
        (1, (40, 40), "batch", 1_921),
        (1, (40, 40), "group", 1_921),
        ((2, 3), (), "batch", 7),
    ],
)
def test_parameter_count(
    input_shape: int | tuple[int, ...], hidden_sizes: tuple[int, ...], norm: str, expected: int
) -> None:
    network = MLP(1, input_shape=input_shape, hidden_sizes=hidden_sizes, norm=norm)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", torch.relu),
        ("tanh", torch.tanh),
        ("gelu", torch.nn.functional.gelu),
        ("silu", torch.nn.functional.silu),
    ],
)
def test_computes_the_formula(activation: str, function) -> None:
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, input_shape=3, hidden_sizes=(4,), activation=activation, generator=generator).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    hidden = function(x @ network.features[0].weight.T + network.features[0].bias)
    torch.testing.assert_close(network(x), hidden @ network.head.weight.T + network.head.bias, rtol=0, atol=1e-12)


def test_group_norm_is_layer_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, input_shape=3, hidden_sizes=(8,), norm="group", generator=generator).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    hidden = torch.nn.functional.layer_norm(network.features[0](x), (8,)).relu()
    torch.testing.assert_close(network(x), network.head(hidden), rtol=0, atol=1e-12)


def test_linear_model_accepts_a_single_example_under_the_batch_policy() -> None:
    assert MLP(1, input_shape=2, hidden_sizes=(), norm="batch")(torch.zeros(1, 2)).shape == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_outputs": 0}, ValueError, "num_outputs must be at least 1, got 0"),
        ({"input_shape": 0}, ValueError, "input_shape must be at least 1, got 0"),
        ({"input_shape": (2, 1.5)}, TypeError, "input_shape must be an int, got 1.5 of type float"),
        ({"hidden_sizes": (40, 0)}, ValueError, "hidden_sizes must be at least 1, got 0"),
        (
            {"activation": "sine"},
            ValueError,
            "activation must be one of 'relu', 'tanh', 'gelu', 'silu', got 'sine'",
        ),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP(**{"num_outputs": 1, "input_shape": 1, **arguments})


def test_skipped_inputs_reach_the_head():
    network = MLP(
        1, input_shape=(2, 3), hidden_sizes=(4,), skip_inputs=True, generator=torch.Generator().manual_seed(0)
    )
    assert network.head.weight.shape == (1, 10)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([x.flatten(1), network.features(x.flatten(1))], 1) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(x), expected)
