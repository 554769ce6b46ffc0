"""What every network of the library promises, whatever its architecture."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

from ibaml.networks import MLP, Conv4, ResNet12

NUM_EXAMPLES = 6
NUM_OUTPUTS = 3
INPUT_SHAPE = (2, 9, 9)


def _conv4(norm: str, generator: torch.Generator, downsample: str) -> Conv4:
    return Conv4(
        NUM_OUTPUTS,
        in_channels=2,
        image_size=9,
        channels=4,
        downsample=downsample,
        norm=norm,
        generator=generator,
    )


def _mlp(norm: str, generator: torch.Generator) -> MLP:
    return MLP(NUM_OUTPUTS, input_shape=INPUT_SHAPE, hidden_sizes=(5, 4), norm=norm, generator=generator)


def _resnet12(norm: str, generator: torch.Generator) -> ResNet12:
    return ResNet12(NUM_OUTPUTS, in_channels=2, image_size=9, widths=(2, 3, 4, 4), norm=norm, generator=generator)


BUILDERS = {
    "conv4-max_pool": lambda norm, generator: _conv4(norm, generator, "max_pool"),
    "conv4-stride": lambda norm, generator: _conv4(norm, generator, "stride"),
    "mlp": _mlp,
    "resnet12": _resnet12,
}

every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
every_norm = pytest.mark.parametrize("norm", ["batch", "group", "none"])

Build = Callable[[str, torch.Generator], nn.Module]


def _problem(build: Build, norm: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    network = build(norm, generator).double()
    x = torch.randn(NUM_EXAMPLES, *INPUT_SHAPE, dtype=torch.float64, generator=generator)
    y = torch.arange(NUM_EXAMPLES) % NUM_OUTPUTS
    return network, x, y, generator


def _parameters(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def _direction(parameters: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(value.shape, dtype=value.dtype, generator=generator) for name, value in parameters.items()
    }


def _flat(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in tree.values()])


def _loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda parameters: nn.functional.cross_entropy(functional_call(network, parameters, (x,)), y)


@every_builder
@every_norm
def test_names_its_policy_and_shapes(build: Build, norm: str) -> None:
    network, x, _, _ = _problem(build, norm)
    assert network.norm == norm
    assert network.input_shape == INPUT_SHAPE
    assert network.num_outputs == NUM_OUTPUTS
    assert network(x).shape == (NUM_EXAMPLES, NUM_OUTPUTS)


@every_builder
@every_norm
def test_has_no_buffers_and_does_not_change_when_used(build: Build, norm: str) -> None:
    network, x, _, _ = _problem(build, norm)
    assert list(network.buffers()) == []
    first = network(x)
    assert torch.equal(network(x), first)
    assert torch.equal(network.eval()(x), first)


@every_builder
@pytest.mark.parametrize("norm", ["group", "none"])
def test_predictions_of_inductive_policies_stand_alone(build: Build, norm: str) -> None:
    network, x, _, generator = _problem(build, norm)
    together = network(x)
    order = torch.randperm(NUM_EXAMPLES, generator=generator)
    torch.testing.assert_close(network(x[order]), together[order], rtol=0, atol=1e-12)
    alone = torch.cat([network(x[i : i + 1]) for i in range(NUM_EXAMPLES)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


@every_builder
def test_predictions_of_the_batch_policy_depend_on_their_company(build: Build) -> None:
    network, x, _, _ = _problem(build, "batch")
    assert (network(x[:3]) - network(x)[:3]).abs().max() > 1e-3


@every_builder
@every_norm
def test_hessian_vector_product_equals_central_difference(build: Build, norm: str) -> None:
    network, x, y, generator = _problem(build, norm)
    gradient = grad(_loss(network, x, y))
    parameters = _parameters(network)
    direction = _direction(parameters, generator)

    _, forward_over_reverse = jvp(gradient, (parameters,), (direction,))
    (reverse_over_reverse,) = vjp(gradient, parameters)[1](direction)

    step = 1e-6
    ahead = gradient({name: value + step * direction[name] for name, value in parameters.items()})
    behind = gradient({name: value - step * direction[name] for name, value in parameters.items()})
    difference = (_flat(ahead) - _flat(behind)) / (2 * step)

    scale = difference.norm()
    assert (_flat(forward_over_reverse) - difference).norm() <= 1e-6 * scale
    assert (_flat(reverse_over_reverse) - difference).norm() <= 1e-6 * scale
    assert (_flat(forward_over_reverse) - _flat(reverse_over_reverse)).norm() <= 1e-10 * scale


@every_builder
@every_norm
def test_vmap_over_stacked_parameters_equals_loop(build: Build, norm: str) -> None:
    network, x, y, generator = _problem(build, norm)
    members = [network, *(build(norm, generator).double() for _ in range(2))]
    stacked, _ = stack_module_state(members)
    stacked = {name: value.detach() for name, value in stacked.items()}
    direction = _direction(_parameters(network), generator)
    loss = _loss(network, x, y)

    def hvp(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return jvp(grad(loss), (parameters,), (direction,))[1]

    outputs = vmap(lambda parameters: functional_call(network, parameters, (x,)))(stacked)
    products = vmap(hvp)(stacked)
    for index, member in enumerate(members):
        torch.testing.assert_close(outputs[index], member(x), rtol=0, atol=1e-12)
        expected = hvp(_parameters(member))
        for name, value in expected.items():
            torch.testing.assert_close(products[name][index], value, rtol=1e-10, atol=1e-10)


@every_builder
def test_vmap_over_tasks_gives_each_task_its_own_statistics(build: Build) -> None:
    network, _, _, generator = _problem(build, "batch")
    tasks = torch.randn(2, NUM_EXAMPLES, *INPUT_SHAPE, dtype=torch.float64, generator=generator)
    outputs = vmap(network)(tasks)
    for index in range(2):
        torch.testing.assert_close(outputs[index], network(tasks[index]), rtol=0, atol=1e-12)


@every_builder
def test_generator_fixes_the_initial_weights(build: Build) -> None:
    first, second, other = (build("batch", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(_flat(_parameters(first)), _flat(_parameters(second)))
    assert not torch.equal(_flat(_parameters(first)), _flat(_parameters(other)))


@every_builder
def test_refuses_another_input_shape(build: Build) -> None:
    network, _, _, _ = _problem(build, "none")
    with pytest.raises(ValueError, match=r"x must have shape \[examples, 2, 9, 9\], got \[6, 2, 10, 9\]"):
        network(torch.zeros(NUM_EXAMPLES, 2, 10, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must have shape \[examples, 2, 9, 9\], got \[2, 9, 9\]"):
        network(torch.zeros(INPUT_SHAPE, dtype=torch.float64))


@every_builder
def test_refuses_an_unknown_norm(build: Build) -> None:
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'running', 'group', 'none', got 'layer'"):
        build("layer", torch.Generator())


@pytest.mark.parametrize(
    "network",
    [
        Conv4(2, image_size=1, channels=4),
        MLP(2, input_shape=(1, 1, 1), hidden_sizes=(4,), norm="batch"),
        ResNet12(2, in_channels=1, image_size=1, widths=(2, 2, 2, 2)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_refuses_batch_statistics_of_one_value(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"x has 1 example\(s\), but norm='batch' needs at least 2"):
        network(torch.zeros(1, 1, 1, 1))
    assert network(torch.zeros(2, 1, 1, 1)).shape == (2, 2)
