"""Features in what backbones return."""

import numpy as np
import pytest
import torch
from torch import nn

from ibaml.backbones import as_features

VALUES = torch.arange(24.0).reshape(2, 3, 4)


class TestForms:
    @pytest.mark.parametrize("outputs", [VALUES[0], VALUES[0].numpy(), VALUES[0].tolist(), list(VALUES[0])])
    def test_vectors_are_features(self, outputs):
        assert torch.equal(as_features(outputs, 3), VALUES[0])

    def test_maps_are_averaged_over_places(self):
        maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
        expected = [[maps[n, c].sum() / 12 for c in range(5)] for n in range(2)]
        torch.testing.assert_close(as_features(maps, 2), torch.tensor(expected))

    def test_sequences_are_averaged_over_what_the_mask_keeps(self):
        mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
        expected = torch.stack([VALUES[0, 0], (VALUES[1, 0] + VALUES[1, 1]) / 2])
        assert torch.equal(as_features(VALUES, 2, mask), expected)
        assert torch.equal(as_features(VALUES, 2), VALUES.mean(1))

    def test_recurrent_layer(self):
        layer = nn.LSTM(4, 6, batch_first=True)
        outputs = layer(VALUES)
        assert torch.equal(as_features(outputs, 2), outputs[0].detach().mean(1))

    def test_names_of_encoders(self):
        pooled, hidden = torch.ones(2, 3), torch.zeros(2, 5, 3)
        assert torch.equal(as_features({"last_hidden_state": hidden, "pooler_output": pooled}, 2), pooled)
        assert torch.equal(as_features({"last_hidden_state": hidden, "pooler_output": None}, 2), hidden[:, 0])
        assert torch.equal(as_features({"anything": pooled}, 2), pooled)

    def test_half_precision_becomes_float32(self):
        assert as_features(VALUES[0].half(), 3).dtype == torch.float32
        assert as_features(np.ones((3, 2)), 3).dtype == torch.float32


class TestRefused:
    @pytest.mark.parametrize("outputs", [torch.ones(2), torch.ones(4, 3), torch.ones(2, 0), torch.tensor(1.0)])
    def test_shapes(self, outputs):
        with pytest.raises(ValueError, match=r"returns shape .* for 2 inputs, but expected .*batch_first=True"):
            as_features(outputs, 2)

    def test_unknown_names(self):
        with pytest.raises(
            ValueError, match="a mapping or dataclass with logits, mask; expected pooler_output or last_hidden"
        ):
            as_features({"logits": VALUES, "mask": VALUES}, 2)

    def test_nothing(self):
        with pytest.raises(ValueError, match="a mapping or dataclass with nothing"):
            as_features({}, 2)

    def test_no_numbers(self):
        with pytest.raises(TypeError, match="returns list of dtype <U1, which holds no numbers"):
            as_features(["a", "b"], 2)

    def test_vectors_of_different_lengths(self):
        with pytest.raises(ValueError, match="vectors of different lengths"):
            as_features([[1.0], [1.0, 2.0]], 2)

    def test_complex_numbers(self):
        with pytest.raises(TypeError, match="complex64, but features are real"):
            as_features(torch.ones(2, 3, dtype=torch.complex64), 2)
