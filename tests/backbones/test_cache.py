"""Features on disk."""

import numpy as np
import pytest

from ibaml.backbones import FeatureCache

KEY = "a" * 64
FIRST, SECOND, THIRD = b"1" * 32, b"2" * 32, b"3" * 32
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_reads_what_it_wrote_and_no_more(tmp_path):
    cache = FeatureCache(KEY, cache_dir=tmp_path)
    path = cache.write([FIRST, SECOND], VALUES)
    found = FeatureCache(KEY, cache_dir=tmp_path).read([SECOND, THIRD])
    assert list(found) == [SECOND] and found[SECOND].tolist() == [3.0, 4.0, 5.0]
    assert cache.num_bytes == path.stat().st_size > VALUES.nbytes


def test_another_key_is_another_cache(tmp_path):
    FeatureCache(KEY, cache_dir=tmp_path).write([FIRST, SECOND], VALUES)
    assert FeatureCache("b" * 64, cache_dir=tmp_path).read([FIRST]) == {}


def test_writers_do_not_overwrite_each_other(tmp_path):
    one, other = FeatureCache(KEY, cache_dir=tmp_path), FeatureCache(KEY, cache_dir=tmp_path)
    one.write([FIRST], VALUES[:1])
    other.write([SECOND], VALUES[1:])
    # The same part by both: one file with the same contents.
    other.write([FIRST], VALUES[:1])
    assert set(one.read([FIRST, SECOND, THIRD])) == {FIRST, SECOND}
    assert len(list(one.folders[0].iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: b"", lambda raw: raw[:200] + b"x" + raw[201:]])
def test_a_damaged_part_counts_as_absent(tmp_path, damage):
    cache = FeatureCache(KEY, cache_dir=tmp_path)
    path = cache.write([FIRST, SECOND], VALUES)
    cache.write([THIRD], VALUES[:1])
    path.write_bytes(damage(path.read_bytes()))
    assert set(cache.read([FIRST, THIRD])) == {THIRD}


def test_half_written_files_are_not_read(tmp_path):
    cache = FeatureCache(KEY, cache_dir=tmp_path)
    path = cache.write([FIRST, SECOND], VALUES)
    path.rename(path.with_name(f".1.abc.{path.name}"))
    assert cache.read([FIRST]) == {} and cache.num_bytes == 0


def test_no_writable_folder_is_a_warning(tmp_path):
    (tmp_path / "features").write_text("a file where a folder should be")
    with pytest.warns(RuntimeWarning, match=r"cannot write features to .*: they are computed anew each time"):
        assert FeatureCache(KEY, cache_dir=tmp_path).write([FIRST], VALUES[:1]) is None
