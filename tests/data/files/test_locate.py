import hashlib
from pathlib import Path

import pooch
import pytest

from ibaml.data import find_data_file
from ibaml.data.files import locate


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three folders standing for the argument, the environment and the per-user cache."""
    folders = [tmp_path / name for name in ("root", "environment", "cache")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("IBAML_DATA", str(folders[1]))
    monkeypatch.setattr(pooch, "os_cache", lambda project: folders[2])
    return folders


def test_argument_then_environment_then_cache(places):
    for folder in reversed(places):
        (folder / "a.zip").write_bytes(b"")
        assert find_data_file("a.zip", places[0]) == folder / "a.zip"


def test_absent_file_says_where_and_how(places):
    with pytest.raises(FileNotFoundError) as caught:
        find_data_file("images_background.zip", places[0])
    message = str(caught.value)
    assert all(str(folder) in message for folder in places)
    assert "brendenlake/omniglot" in message and "download=True" in message


def test_absent_file_without_environment(places, monkeypatch):
    monkeypatch.delenv("IBAML_DATA")
    with pytest.raises(FileNotFoundError, match=r"\$IBAML_DATA is not set.*Put it into one of them"):
        find_data_file("mine.zip")


def test_file_without_address_cannot_be_downloaded(places):
    with pytest.raises(FileNotFoundError, match="columns alphabet,character,split"):
        find_data_file("omniglot_vinyals_split.csv", download=True)


def test_download_checks_the_checksum(places, monkeypatch):
    content = b"archive"
    addresses = []

    def fetch(url, output_file, pooch_):
        addresses.append(url)
        Path(output_file).write_bytes(content)

    def retrieve(url, known_hash, fname, path):
        return original(url, known_hash, fname=fname, path=path, downloader=fetch)

    original = pooch.retrieve
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(ValueError, match="does not match the known hash"):
        find_data_file("images_background.zip", download=True)
    source = locate.SOURCES["images_background.zip"]
    checksum = f"md5:{hashlib.md5(content).hexdigest()}"
    monkeypatch.setitem(locate.SOURCES, "images_background.zip", source._replace(checksum=checksum))
    assert find_data_file("images_background.zip", download=True) == places[2] / "images_background.zip"
    assert set(addresses) == {"https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip"}
    (places[2] / "images_background.zip").unlink()
    assert find_data_file("images_background.zip", places[0], download=True).parent == places[0]


def test_cache_folders(places):
    assert locate.cache_folders(places[0]) == [places[0]]
    assert locate.cache_folders() == places[1:]


def test_users_without_a_home(places, monkeypatch):
    """As in containers, whose user may have no entry in the list of users."""

    def no_home(project: str) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pooch, "os_cache", no_home)
    assert locate.search_folders() == places[1:2]
    monkeypatch.setenv("IBAML_DATA", "~nobody-of-that-name/x")
    with pytest.raises(ValueError, match="IBAML_DATA is '~nobody-of-that-name/x', and the home folder .* is not known"):
        find_data_file("a.npz")
    monkeypatch.delenv("IBAML_DATA")
    with pytest.raises(FileNotFoundError, match="a.npz not found; looked in no folder, as this user has no home"):
        find_data_file("a.npz")
    with pytest.raises(FileNotFoundError, match="images_background.zip cannot be kept: this user has no home folder"):
        find_data_file("images_background.zip", download=True)
