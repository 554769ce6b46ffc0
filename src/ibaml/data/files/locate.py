"""Where data files are looked for: an explicit folder, then ``$IBAML_DATA``, then a per-user cache."""

import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ibaml.checks import expand_home

ENVIRONMENT_VARIABLE = "IBAML_DATA"
"""Environment variable that names the folder with data files."""


class Source(NamedTuple):
    """Where a data file comes from.

    Attributes:
        help: One sentence on how to get the file.
        url: Direct address of the publisher's file; None if it cannot be fetched without a person.
        checksum: ``algorithm:hexadecimal digest`` of the publisher's file, which a download must match.
    """

    help: str
    url: str | None = None
    checksum: str | None = None


_OMNIGLOT_FOLDER = "https://github.com/brendenlake/omniglot/raw/master/python/"

SOURCES: dict[str, Source] = {
    "images_background.zip": Source(
        help="It is python/images_background.zip of https://github.com/brendenlake/omniglot; "
        "pass download=True to fetch it.",
        url=_OMNIGLOT_FOLDER + "images_background.zip",
        checksum="md5:68d2efa1b9178cc56df9314c21c6e718",
    ),
    "images_evaluation.zip": Source(
        help="It is python/images_evaluation.zip of https://github.com/brendenlake/omniglot; "
        "pass download=True to fetch it.",
        url=_OMNIGLOT_FOLDER + "images_evaluation.zip",
        checksum="md5:6b91aef0f799c5bb55b94e3f2daec811",
    ),
    "omniglot_vinyals_split.csv": Source(
        help="It lists the split of Vinyals et al. 2016 with the columns alphabet,character,split "
        "(for example Greek,character01,train); put it beside the archives, or use protocol='official', "
        "which needs no such file.",
    ),
    "fsmol_train_valid.npz": Source(
        help="It holds FS-Mol's training and validation assays (Stanley et al. 2021, CC BY-SA 3.0) in the layout that "
        "ibaml.data.load_assays describes.",
    ),
}
"""Files that the loaders know how to get, by name."""


def search_folders(root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Lists the folders to look in, in order: ``root``, ``$IBAML_DATA``, the per-user cache.

    Args:
        root: A folder given by the caller, if any.

    Returns:
        None to three paths, which need not exist.

    Raises:
        ValueError: If a path begins with a home folder that is not known.
    """
    folders: list[Path] = []
    if root is not None:
        folders.append(expand_home("root", root))
    if environment := os.environ.get(ENVIRONMENT_VARIABLE):
        folders.append(expand_home(ENVIRONMENT_VARIABLE, environment))
    # In some containers a user has no home, and so no cache of his own.
    with contextlib.suppress(RuntimeError, KeyError):
        folders.append(Path(_pooch().os_cache("ibaml")))
    return folders


def _pooch() -> ModuleType:
    import pooch  # takes long, and importing the library needs no data file

    return pooch


def cache_folders(cache_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Lists the folders for files that the library makes itself, in order of preference.

    Args:
        cache_dir: A folder given by the caller; if given, it is the only one.

    Returns:
        ``[cache_dir]``, or ``$IBAML_DATA`` (if set) and the per-user cache.
    """
    return [expand_home("cache_dir", cache_dir)] if cache_dir is not None else search_folders()


def find_data_file(name: str, root: str | os.PathLike[str] | None = None, *, download: bool = False) -> Path:
    """Finds a data file under ``root``, then ``$IBAML_DATA``, then the per-user cache.

    Args:
        name: File name, for example ``"images_background.zip"``.
        root: Folder to look in first.
        download: Whether to fetch a file that is nowhere to be found from its publisher, check its checksum and keep
            it in ``root`` or else in the per-user cache.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: If the file is in none of the places and is not, or cannot be, downloaded. The message says
            where it was looked for and how to get it.
        ValueError: If a downloaded file does not match its checksum.
    """
    folders = search_folders(root)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    source = SOURCES.get(name)
    if download and source is not None and source.url is not None:
        if not folders:
            raise FileNotFoundError(f"{name} cannot be kept: this user has no home folder. Set {ENVIRONMENT_VARIABLE}.")
        target = folders[0] if root is not None else folders[-1]
        return Path(_pooch().retrieve(source.url, known_hash=source.checksum, fname=name, path=target))
    places = ", ".join(str(folder) for folder in folders) or "no folder, as this user has no home"
    advice = source.help if source is not None else "Put it into one of them."
    unset = "" if os.environ.get(ENVIRONMENT_VARIABLE) else f" (${ENVIRONMENT_VARIABLE} is not set)"
    raise FileNotFoundError(f"{name} not found; looked in {places}{unset}. {advice}")
