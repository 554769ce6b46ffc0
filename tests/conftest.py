"""What all tests share: the hypothesis profile, and folders that keep them out of the user's own cache."""

import os
from pathlib import Path

import pooch
import pytest
from hypothesis import settings

# Shared machines are slow now and then; a deadline would make a failure of that.
settings.register_profile("ibaml", deadline=None, max_examples=50)
settings.load_profile("ibaml")

# Read before any test changes the environment.
_DATA = Path(os.environ.get("IBAML_DATA") or Path(__file__).parents[1].parent / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """Puts the per-user cache into a folder of this test session, one for all of its workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooch, "os_cache", lambda project: folder / "user_cache" / str(project))
        yield Path(pooch.os_cache("ibaml"))


@pytest.fixture(scope="session")
def glyph_cache(user_cache):
    """A folder for ``load_glyphs(..., cache_dir=...)`` or $IBAML_DATA, so that a session renders glyphs once."""
    user_cache.mkdir(parents=True, exist_ok=True)
    return user_cache


@pytest.fixture(scope="session")
def shared_data():
    """The folder with the real data sets, or a skip."""
    if not (_DATA / "images_background.zip").is_file():
        pytest.skip(f"no data files in {_DATA}: set IBAML_DATA to the folder of images_background.zip")
    return _DATA
