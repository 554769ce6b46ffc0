import pytest
import torch

from ibaml.networks import Conv4


@pytest.mark.parametrize(
    ("channels", "num_groups"), [(1, 1), (4, 1), (8, 2), (12, 1), (16, 4), (18, 2), (32, 8), (64, 8), (512, 8)]
)
def test_groups_are_equal_and_not_too_small(channels: int, num_groups: int) -> None:
    network = Conv4(2, image_size=16, channels=channels, norm="group")
    groups = [module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert groups == [num_groups] * 4


def test_batch_policy_is_batch_normalisation_by_the_batch_at_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    network = Conv4(2, image_size=8, channels=4, generator=generator).double()
    x = 3 + 2 * torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=generator)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    norm = network.features[1]
    torch.testing.assert_close(norm(x), (x - mean) / torch.sqrt(variance + 1e-5), rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.eval()(x), (x - mean) / torch.sqrt(variance + 1e-5), rtol=0, atol=1e-12)
