"""Saved models: a folder with the tensors (safetensors) and the settings (JSON), read without running code.

| file | what |
|---|---|
| model.safetensors | tensors, and in its header the settings and a checksum of both |
| model.json | the settings as text to read, with versions and the checksum of the tensors |

A byte changed in either file is noticed, as is a file of a newer format.
"""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ibaml.train.checkpoint import digest, load_tensors, save_tensors
from ibaml.types import Tensor

MODEL = "model.safetensors"
SETTINGS = "model.json"
MODEL_FORMAT = 2
"""Format of the folder: 1 had no preprocessing and no model.json."""

_PACKAGES = ("ibaml", "torch", "numpy", "safetensors")


def write_model(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """Writes a model and returns its folder, for ``read_model``.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        **settings,
        "model_format": MODEL_FORMAT,
        "versions": {name: version(name) for name in _PACKAGES},
        "tensors_sha256": digest(plain),
    }
    save_tensors(folder / MODEL, plain, metadata)
    temporary = folder / f".{SETTINGS}.{os.getpid()}"
    temporary.write_text(_as_text(metadata), encoding="utf-8", newline="\n")
    os.replace(temporary, folder / SETTINGS)
    return folder


def read_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``write_model`` wrote.

    Raises:
        FileNotFoundError: If there is no saved model.
        ValueError: If a file is damaged, foreign or of a newer format.
    """
    path = folder / MODEL
    tensors, metadata = load_tensors(path)
    if "likelihood" not in metadata:
        raise ValueError(f"{path} is no saved MetaLearner: it was not written by MetaLearner.save.")
    found = metadata.get("model_format", 1)
    if found == 1:
        return tensors, metadata
    if found != MODEL_FORMAT:
        raise ValueError(
            f"{path} has model format {found}, but this version of ibaml reads {MODEL_FORMAT}: it was written by "
            f"ibaml {metadata.get('versions', {}).get('ibaml', 'of another version')}; update ibaml."
        )
    settings = folder / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}, which belongs to {MODEL}: copy the folder as a whole.")
    if settings.read_bytes() != _as_text(metadata).encode():
        raise ValueError(
            f"{settings} is not the one that was saved with {MODEL}: it was changed or belongs to another model. "
            "Restore the folder from a copy."
        )
    return tensors, metadata


def _as_text(metadata: Mapping[str, Any]) -> str:
    # Through JSON once, so that what was just saved and what was read back give the same bytes.
    return json.dumps(json.loads(json.dumps(dict(metadata))), indent=2, sort_keys=True) + "\n"
