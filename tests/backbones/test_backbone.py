"""The record of a backbone: checks, digest, and images as its module wants them."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ibaml.backbones import Backbone, as_backbone
from ibaml.data.images import resize_image, to_pixels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
PIXELS = torch.randint(0, 256, (4, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class TestImages:
    def test_pixels_are_scaled_and_normalised(self):
        backbone = Backbone(module=nn.Identity(), mean=MEAN, std=STD)
        expected = (PIXELS.double() / 255 - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
        torch.testing.assert_close(backbone.prepare("x", PIXELS), expected.float())
        torch.testing.assert_close(backbone.prepare("x", PIXELS / 255), expected.float())

    @pytest.mark.parametrize("channels", [1, 3])
    def test_pixels_are_resized_as_files_are(self, channels):
        pixels = PIXELS[:, :channels]
        found = Backbone(module=nn.Identity(), image_size=(8, 7)).prepare("x", pixels)
        image = Image.fromarray(pixels[1].permute(1, 2, 0).squeeze(-1).numpy())
        expected = to_pixels(resize_image(image, (8, 7)))
        assert torch.equal(found[1], torch.from_numpy(expected.copy()) / 255)

    def test_other_inputs_are_left_alone(self):
        backbone = Backbone(module=nn.Identity(), image_size=8, mean=MEAN, std=STD)
        for values in (torch.ones(2, 3), torch.ones(2, 3, 4, 5, 6), torch.ones(2, 3, dtype=torch.int64)):
            assert backbone.prepare("x", values) is values

    def test_refused(self):
        backbone = Backbone(module=nn.Identity(), image_size=6, mean=MEAN, std=STD)
        with pytest.raises(
            ValueError, match=r"x has images of height and width \(6, 5\), but the backbone takes \(6, 6"
        ):
            backbone.prepare("x", PIXELS / 255)
        with pytest.raises(ValueError, match=r"x has pixels between 0 and 2, but expected \[0, 1\]"):
            backbone.prepare("x", torch.tensor([0.0, 2.0]).expand(1, 3, 6, 2).repeat(1, 1, 1, 3))
        with pytest.raises(ValueError, match=r"images of shape \(6, 5, 3\), but the backbone takes 3 channels"):
            backbone.prepare("x", PIXELS.permute(0, 2, 3, 1))


class TestDigest:
    def test_follows_weights_name_and_method(self):
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        digest = Backbone(module=module).digest()
        assert digest == Backbone(module=copy.deepcopy(module)).digest()
        assert digest != Backbone(module=module, name="other").digest()
        assert digest != Backbone(module=module.forward).digest()
        module[1].running_mean += 1
        assert digest != Backbone(module=module).digest()

    def test_a_function_is_known_by_its_name_alone(self):
        assert Backbone(module=np.asarray).digest() is None
        assert Backbone(module=np.asarray, name="a").digest() == Backbone(module=len, name="a").digest()


def test_a_module_becomes_a_record_and_a_record_stays():
    module = nn.Linear(2, 3)
    record = as_backbone(module)
    assert record.module is module and as_backbone(record) is record
    assert record.size is None and Backbone(module=module, image_size=4).size == (4, 4)
    assert "Linear" not in repr(record)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\), but is 2"),
        ({"mean": MEAN}, "std is None, but pixels are normalised by mean and std together"),
        ({"std": STD}, "mean is None, but pixels"),
        ({"mean": (0.5,), "std": STD}, "mean has 1 and std 3 values, but there are 3 channels"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, r"std must be positive and finite, but is \(0.2, 0.0, 0.2\)"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Backbone(module=nn.Identity(), **settings)


def test_what_cannot_be_called():
    with pytest.raises(TypeError, match="backbone must be an nn.Module, a callable or a Backbone, but is a int"):
        as_backbone(18)
