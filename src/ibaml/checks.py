"""Checks of arguments that come from outside, each once."""

import operator
import os
from pathlib import Path
from typing import Any

import torch


def require_int(name: str, value: Any) -> int:
    """Returns ``value`` as an int if it is an integer, of Python or numpy.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Raises:
        TypeError: If ``value`` is not an integer.

    Examples:
        >>> require_int("seed", 3)
        3
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.") from error


def require_positive_int(name: str, value: object) -> int:
    """Returns ``value`` if it is an integer of at least one.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The value, unchanged.

    Raises:
        TypeError: If ``value`` is not an integer (bool counts as not an integer).
        ValueError: If ``value`` is below one.

    Examples:
        >>> require_positive_int("num_ways", 5)
        5
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a positive count.")
    return value


def require_cpu_generator(generator: object) -> torch.Generator:
    """Returns ``generator`` if it is a ``torch.Generator`` on the CPU.

    Indices are always drawn on the CPU, so that a seed gives the same tasks whatever device holds the data.

    Args:
        generator: What the caller passed.

    Returns:
        The generator, unchanged.

    Raises:
        TypeError: If it is not a ``torch.Generator``.
        ValueError: If it lives on another device than the CPU.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "pass torch.Generator().manual_seed(seed)."
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must live on the cpu, got {generator.device}; create it with torch.Generator(). "
            "The data may still live on any device."
        )
    return generator


def expand_home(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path with ``~`` and ``~user`` in place of a home folder written out.

    Args:
        name: Name of the argument, for the message.
        path: What the caller passed.

    Raises:
        ValueError: If that user is not known, or this one has no home folder.

    Examples:
        >>> expand_home("path", "data/images").as_posix()
        'data/images'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name} is {os.fspath(path)!r}, and the home folder that it begins with is not known: write the path out."
        ) from error
