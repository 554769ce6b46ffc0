import unicodedata
import warnings

import numpy as np
import pooch
import pytest
import torch

from ibaml.data import EpisodeSampler, load_glyphs
from ibaml.data.files.cache import read_class_images
from ibaml.data.sources import glyphs


@pytest.fixture(scope="module")
def folder(glyph_cache):
    return glyph_cache


@pytest.fixture(scope="module")
def splits(folder):
    return {split: load_glyphs(split, cache_dir=folder) for split in ("train", "validation", "test")}


def test_scripts_stay_in_their_split(splits):
    for split, images in splits.items():
        for name in images.class_names:
            assert name.split(" ", 1)[1].startswith(glyphs.SCRIPTS[split])
    names = [name for images in splits.values() for name in images.class_names]
    assert len(set(names)) == len(names)


def test_enough_classes_of_twenty_images(splits):
    # Counts move a little with the fonts; a large change means that the choice of characters broke.
    for split, least in (("train", 850), ("validation", 20), ("test", 110)):
        images = splits[split]
        assert images.num_classes >= least
        assert images.class_sizes.unique().tolist() == [20]
        assert images.image_shape == (1, 28, 28)
    EpisodeSampler(splits["test"], num_ways=20, num_shots=5, num_queries=15)


def test_characters_that_look_alike_occur_once(splits):
    names = {split: set(images.class_names) for split, images in splits.items()}
    assert "U+0041 LATIN CAPITAL LETTER A" in names["train"]
    assert "U+0391 GREEK CAPITAL LETTER ALPHA" not in names["validation"]
    assert "U+0410 CYRILLIC CAPITAL LETTER A" not in names["train"]
    assert "U+0585 ARMENIAN SMALL LETTER OH" not in names["test"]
    assert "U+03A9 GREEK CAPITAL LETTER OMEGA" in names["validation"]
    assert (
        "U+0531 ARMENIAN CAPITAL LETTER AYB" in names["test"] or "U+0532 ARMENIAN CAPITAL LETTER BEN" in names["test"]
    )


def test_no_class_is_an_accented_letter(splits):
    for images in splits.values():
        for name in images.class_names:
            decomposition = unicodedata.decomposition(chr(int(name[2:].split()[0], 16)))
            assert not decomposition or decomposition.startswith("<")


def test_images_are_ink_on_black_and_centred(splits):
    ramp = torch.linspace(-13.5, 13.5, 28)
    for images in splits.values():
        pixels = images.images.squeeze(1).float()
        assert (pixels.flatten(1).amax(1) > 180).all(), "no image is blank"
        assert (pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).float().mean() > 0.99, "paper is black"
        assert (pixels > 127).float().mean() < 0.4
        ink = pixels > 64
        rows, columns = ink.any(2), ink.any(1)
        spans = torch.stack([rows.sum(1), columns.sum(1)]).amax(0)
        assert spans.float().mean() > 17, "glyphs fill the image"
        middle = (pixels.sum(1) * ramp).sum(1) / pixels.sum((1, 2))
        assert abs(float(middle.mean())) < 1


def test_images_of_a_class_differ(splits):
    images = splits["test"].images.reshape(-1, 20, 28 * 28)
    assert all(len(torch.unique(of_class, dim=0)) == 20 for of_class in images)


def test_glyphs_are_no_missing_character_boxes():
    fonts, charmaps = glyphs._open_faces(28)
    for font, charmap in zip(fonts, charmaps, strict=True):
        assert 0x10FFFD not in charmap
        assert set(charmap) >= {ord("A"), ord("z")}
        missing = np.asarray(font.getmask(chr(0x10FFFD), mode="L")).tobytes()
        assert missing != np.asarray(font.getmask("A", mode="L")).tobytes()


def test_nearest_neighbour_is_well_above_chance_and_below_certainty(splits):
    sampler = EpisodeSampler(splits["test"], num_ways=5, num_shots=5, num_queries=15)
    episode = sampler.sample(100, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(episode.query.x.flatten(2), episode.support.x.flatten(2))
    accuracy = (episode.support.y.gather(1, distance.argmin(-1)) == episode.query.y).float().mean()
    assert 0.5 < accuracy < 0.95


def test_cache_serves_and_damage_is_repaired(splits, folder, monkeypatch):
    calls = []

    def render(image_size):
        calls.append(image_size)
        return splits

    monkeypatch.setattr(glyphs, "render_glyphs", render)
    assert torch.equal(load_glyphs("test", cache_dir=folder).images, splits["test"].images)
    assert not calls
    name = glyphs._cache_name("test", 28)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert torch.equal(load_glyphs("test", cache_dir=folder).images, splits["test"].images)
    assert calls == [28]
    assert read_class_images([folder], name) is not None


def test_environment_names_the_cache(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "render_glyphs", lambda image_size: splits)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "user")
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "environment"))
    load_glyphs("validation")
    assert len(list((tmp_path / "environment").glob("glyphs-*.npz"))) == 3
    assert not (tmp_path / "user").exists()


def test_works_without_a_writable_cache(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "render_glyphs", lambda image_size: splits)
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="cannot write the cache file glyphs-") as caught:
        images = load_glyphs("test", cache_dir=tmp_path / "file")
    assert len(caught) == 1
    assert images.num_classes == splits["test"].num_classes


def test_rendering_is_deterministic_and_scales(monkeypatch):
    monkeypatch.setattr(glyphs, "SCRIPTS", {"train": ("HEBREW",), "validation": ("OGHAM", "LISU"), "test": ("LAO",)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again, larger = glyphs.render_glyphs(16), glyphs.render_glyphs(16), glyphs.render_glyphs(40)
    for split in first:
        assert first[split].image_shape == (1, 16, 16)
        assert torch.equal(first[split].images, again[split].images)
        assert larger[split].image_shape == (1, 40, 40)
        assert larger[split].class_names == first[split].class_names, "the classes do not depend on the size"


def test_missing_fonts_are_reported(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the font DejaVuSans.ttf is not in .*reinstall matplotlib"):
        glyphs.render_glyphs(28)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(split="val"), ValueError, "split must be one of .*validation.*, got 'val'"),
        (dict(split="test", image_size=7), ValueError, "image_size must be at least 8 .*, got 7"),
        (dict(split="test", image_size=0), ValueError, "image_size must be at least 1"),
        (dict(split="test", image_size=28.0), TypeError, "image_size must be an int"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        load_glyphs(**arguments)
