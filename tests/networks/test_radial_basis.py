import pytest
import torch

from ibaml.algorithms.heads.gp import matern52
from ibaml.networks import NetworkSettings, RadialBasis, network_settings
from ibaml.networks.radial_basis import radial_features, spread_out


def kernel(left, right, length_scale):
    return matern52((((left[:, None] - right[None]) / length_scale) ** 2).sum(-1))


def test_independent_weights_give_the_approximation_of_nystroem():
    generator = torch.Generator().manual_seed(0)
    x, centres = (torch.randn(n, 2, dtype=torch.float64, generator=generator) for n in (7, 4))
    length_scale = torch.tensor([0.7, 1.9], dtype=torch.float64)
    found = radial_features(x, centres, torch.log(length_scale))
    cross = kernel(x, centres, length_scale)
    inner = kernel(centres, centres, length_scale) + 1e-4 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, cross @ torch.linalg.inv(inner) @ cross.T, rtol=0, atol=1e-12)


def test_at_all_inputs_as_centres_it_is_the_process_itself():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(1)
    found = radial_features(x, x, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, kernel(x, x, 1.0), rtol=0, atol=3e-4)


def test_the_head_sees_the_functions_and_the_inputs():
    network = RadialBasis(2, input_shape=3, num_centres=5, zero_head=False, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    features = torch.cat([radial_features(x, network.centres, network.log_length_scale), x], 1)
    torch.testing.assert_close(network(x), features @ network.head.weight.T + network.head.bias)


def test_derivatives_are_those_of_finite_differences_also_where_inputs_are_centres():
    centres = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_length_scale = torch.tensor([0.1, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scale: radial_features(centres, centres, scale), log_length_scale)


def test_centres_are_chosen_by_what_those_before_leave_unsaid():
    """The greedy choice from dense conditional variances."""
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = spread_out(x, 6, torch.zeros(2, dtype=torch.float64))
    chosen = [0]
    whole = kernel(x, x, 1.0)
    for _ in range(5):
        inner = whole[chosen][:, chosen]
        left = 1 - (whole[:, chosen] @ torch.linalg.inv(inner) * whole[:, chosen]).sum(1)
        chosen.append(int(left.argmax()))
    torch.testing.assert_close(found, x[chosen])


def test_repeated_inputs_give_one_centre_each():
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]])
    assert spread_out(x, 4, torch.zeros(1)).flatten().tolist() == [0.0, 1.0]


def test_settings_build_it_again():
    network = RadialBasis(1, input_shape=2, num_centres=3)
    settings = network_settings(network)
    assert settings == NetworkSettings(name="RadialBasis", arguments=network.constructor_arguments)
    settings.build().load_state_dict(network.state_dict())


def test_works_under_vmap_over_parameters():
    network = RadialBasis(1, input_shape=2, num_centres=3, zero_head=False, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    parameters = {name: torch.stack([value, 1.5 * value]) for name, value in network.state_dict().items()}
    found = torch.func.vmap(lambda own: torch.func.functional_call(network, own, (x,)))(parameters)
    for index in range(2):
        own = {name: value[index] for name, value in parameters.items()}
        torch.testing.assert_close(found[index], torch.func.functional_call(network, own, (x,)))


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="num_centres must be at least 1"):
        RadialBasis(1, input_shape=2, num_centres=0)
    with pytest.raises(ValueError, match="x must have shape .examples, 2."):
        RadialBasis(1, input_shape=2, num_centres=3)(torch.zeros(4, 3))
