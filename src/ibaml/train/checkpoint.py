"""Checkpoints: one safetensors file with tensors and JSON, written in one move, read without running code."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ibaml import tree
from ibaml.algorithms import MetaParameters
from ibaml.types import Tensor

FORMAT = "ibaml-1"
"""Format of the files that this version writes and reads."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata; an older file at ``path`` stays whole until the new one is complete.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device.
        metadata: JSON-serialisable values.

    Raises:
        OSError: If the file cannot be written; a file already at ``path`` is then unchanged.
    """
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(dict(metadata), sort_keys=True)
    header = {"format": FORMAT, "sha256": digest(contiguous, text), "json": text}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(contiguous, temporary, metadata=header)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of ``save_tensors``.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, changed, foreign, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({error}): it is truncated or not a safetensors file. Restore it from a "
            "copy, or remove it to start anew."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}, but this version reads {FORMAT!r}: it was written by another "
            "program or a newer version of ibaml."
        )
    if header.get("sha256") != digest(tensors, header.get("json", "")):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents. Restore it from a copy.")
    return tensors, json.loads(header["json"])


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Returns the SHA-256 of a text and of all names, dtypes, shapes and bytes of CPU tensors."""
    value = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        value.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return value.hexdigest()


def meta_to_tensors(meta: MetaParameters) -> dict[str, Tensor]:
    """Flattens meta-parameters into named tensors, such as ``prior/mean/head.weight`` and ``shared/log_noise``."""
    return tree.named_leaves(meta)


def meta_from_tensors(tensors: Mapping[str, Tensor], *, like: MetaParameters, source: str) -> MetaParameters:
    """Rebuilds meta-parameters, refusing those of another network or algorithm.

    Args:
        tensors: What ``meta_to_tensors`` returned, possibly among other tensors.
        like: Meta-parameters of the model that is to take them; gives names, shapes, dtypes and devices.
        source: Name of the file, for messages.

    Raises:
        ValueError: If names or shapes differ, naming the first differences.
    """
    expected = meta_to_tensors(like)
    found = {name: value for name, value in tensors.items() if name.split("/")[0] in MetaParameters._fields}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"{source} belongs to another network or algorithm: {'; '.join(sorted(problems)[:5])}"
            f"{'; and more' if len(problems) > 5 else ''}. Build the model with the settings that it was trained with."
        )

    named = iter([found[name].to(dtype=value.dtype, device=value.device) for name, value in expected.items()])
    return tree.map(lambda leaf: next(named), like)
