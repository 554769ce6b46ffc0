"""A file is old or new, never a part."""

import errno
import os

import pytest

from ibaml import atomic
from ibaml.atomic import atomic_write, read_json, write_text


def test_a_block_that_ends_replaces_the_file(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "file.txt", "text")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.__getitem__)
def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path, monkeypatch, number):
    path = tmp_path / "file.csv"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"file.csv cannot be written: the disk is full \(.+\). What was .*make room"
    ) as told:
        write_text(path, "new")
    assert told.value.errno == number
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_has_the_same_bytes_everywhere(tmp_path):
    write_text(tmp_path / "file.txt", "one\ntwö\n")
    assert (tmp_path / "file.txt").read_bytes() == b"one\ntw\xc3\xb6\n"


def test_json_is_read_with_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*file.json"):
        read_json(path)
    write_text(path, '{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    write_text(path, "[" * 100_000)
    with pytest.raises(ValueError, match="it is nested too deeply"):
        read_json(path)
    write_text(path, "[1")
    with pytest.raises(ValueError, match="Expecting"):
        read_json(path)
    monkeypatch.setattr(atomic, "_MOST_BYTES", 1)
    with pytest.raises(ValueError, match="it has 2 bytes, and at most 1 are read"):
        read_json(path)
