import pytest
import torch

from ibaml.networks import ResNet12


@pytest.mark.parametrize("image_size", [1, 3, 14, 28, 84, (20, 40)])
def test_every_image_size_works(image_size: int | tuple[int, int]) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    network = ResNet12(5, image_size=image_size, widths=(2, 3, 4, 5))
    assert network(torch.zeros(2, 3, height, width)).shape == (2, 5)


def test_stages_halve_the_feature_map() -> None:
    network = ResNet12(5, image_size=84, widths=(2, 3, 4, 5))
    assert network.features(torch.zeros(2, 3, 84, 84)).shape == (2, 5, 5, 5)


def test_parameter_count() -> None:
    # A stage from i to o channels has 9io + 2*9oo + io weights and four norms of 2o: 76,160 + 377,856 + 1,509,376 +
    # 6,033,408 for the four stages, and the head has 512*5 + 5.
    network = ResNet12(5)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_999_365


def test_convolutions_have_biases_only_without_normalisation() -> None:
    def num_biases(norm: str) -> int:
        network = ResNet12(5, widths=(2, 2, 2, 2), norm=norm)
        return sum(module.bias is not None for module in network.modules() if isinstance(module, torch.nn.Conv2d))

    assert num_biases("none") == 16
    assert num_biases("batch") == 0
    assert num_biases("group") == 0


def test_stage_computes_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    network = ResNet12(5, in_channels=2, image_size=8, widths=(3, 3, 3, 3), norm="none", generator=generator).double()
    stage = network.features[0]
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=generator)
    leaky = torch.nn.functional.leaky_relu
    first, second, third = (module for module in stage.branch if isinstance(module, torch.nn.Conv2d))
    y = leaky(third(leaky(second(leaky(first(x), 0.1)), 0.1)) + stage.shortcut(x), 0.1)
    torch.testing.assert_close(stage(x), torch.nn.functional.max_pool2d(y, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64, 128)}, r"widths must give the channels of 4 stages, got 2 of them: \(64, 128\)"),
        ({"widths": (64, 128, 0, 1)}, "widths must be at least 1, got 0"),
        ({"num_outputs": -1}, "num_outputs must be at least 1, got -1"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet12(**{"num_outputs": 5, **arguments})
