"""Which settings of a source decide its test tasks."""

import torch

from ibaml.data.sources import Glyphs, Omniglot, Sinusoid, settings_of_tests


def test_settings_of_training_alone_are_left_out(glyph_cache) -> None:
    first = Glyphs(num_ways=3, num_queries=2, num_train_ways=4, num_train_shots=3)
    other = Glyphs(num_ways=3, num_queries=7)
    assert settings_of_tests(first) == settings_of_tests(other) != settings_of_tests(Glyphs(num_ways=4))
    # As they say: the test tasks are the same.
    drawn = [
        source.sampler("test", data=glyph_cache).sample(1, generator=torch.Generator().manual_seed(0))
        for source in (first, other)
    ]
    assert all(torch.equal(a, b) for one, two in zip(*drawn, strict=True) for a, b in zip(one, two, strict=True))
    of_training = first.sampler("train", data=glyph_cache).sample(1, generator=torch.Generator().manual_seed(0))
    assert of_training.support.y.shape == (1, 4 * 3) and of_training.query.y.shape == (1, 4 * 2)
    assert not {"rotations", "augmentation"} & settings_of_tests(Omniglot()).keys()
    assert settings_of_tests(Omniglot(rotated_tests=False)) != settings_of_tests(Omniglot())
    assert settings_of_tests(Sinusoid(num_shots=3))["num_shots"] == 3
