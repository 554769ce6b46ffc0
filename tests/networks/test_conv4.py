import pytest
import torch

from ibaml.networks import Conv4


@pytest.mark.parametrize("image_size", [1, 2, 5, 14, 16, 28, 33, 84, 105, (20, 64)])
@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
def test_every_image_size_works(image_size: int | tuple[int, int], downsample: str) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    network = Conv4(5, in_channels=3, image_size=image_size, channels=4, downsample=downsample)
    assert network(torch.zeros(2, 3, height, width)).shape == (2, 5)


@pytest.mark.parametrize(
    ("image_size", "downsample", "num_pixels"),
    [
        (28, "max_pool", 1),
        (84, "max_pool", 25),
        (105, "max_pool", 36),
        (14, "max_pool", 1),
        ((4, 16), "max_pool", 4),
        (28, "stride", 4),
        (84, "stride", 36),
        (14, "stride", 1),
    ],
)
def test_head_reads_the_whole_last_feature_map(
    image_size: int | tuple[int, int], downsample: str, num_pixels: int
) -> None:
    network = Conv4(5, image_size=image_size, channels=8, downsample=downsample)
    assert network.head.in_features == 8 * num_pixels


@pytest.mark.parametrize(
    ("in_channels", "image_size", "channels", "downsample", "norm", "expected"),
    [
        # First block 3*9*32 + 32, three blocks 32*9*32 + 32, four norms 2*32, head 800*5 + 5.
        (3, 84, 32, "max_pool", "batch", 32_901),
        (3, 84, 64, "max_pool", "batch", 121_093),
        # First block 9*64 + 64, three blocks 64*9*64 + 64, four norms 2*64, head 64*5 + 5.
        (1, 28, 64, "max_pool", "group", 112_261),
        (1, 28, 64, "max_pool", "none", 111_749),
        (1, 28, 64, "stride", "batch", 113_221),
    ],
)
def test_parameter_count(
    in_channels: int, image_size: int, channels: int, downsample: str, norm: str, expected: int
) -> None:
    network = Conv4(
        5, in_channels=in_channels, image_size=image_size, channels=channels, downsample=downsample, norm=norm
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_bias_before_batch_statistics_has_no_effect() -> None:
    generator = torch.Generator().manual_seed(0)
    network = Conv4(2, image_size=8, channels=4, generator=generator).double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=generator)
    before = network(x)
    torch.nn.init.ones_(network.features[0].bias)
    torch.testing.assert_close(network(x), before, rtol=0, atol=1e-12)


def test_initial_activations_keep_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    network = Conv4(5, image_size=32, channels=64, downsample="stride", norm="none", generator=generator)
    features = network.features(torch.randn(32, 1, 32, 32, generator=generator))
    # He initialisation keeps the mean square of the inputs, here 1, up to zero padding at the borders.
    assert 0.2 < features.square().mean() < 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_outputs": 0}, ValueError, "num_outputs must be at least 1, got 0"),
        ({"num_outputs": 2.0}, TypeError, "num_outputs must be an int, got 2.0 of type float"),
        ({"channels": -3}, ValueError, "channels must be at least 1, got -3"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        (
            {"image_size": (28, 28, 3)},
            ValueError,
            r"image_size must be one side or \(height, width\), got \(28, 28, 3\)",
        ),
        ({"downsample": "mean"}, ValueError, "downsample must be one of 'max_pool', 'stride', got 'mean'"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Conv4(**{"num_outputs": 5, **arguments})
