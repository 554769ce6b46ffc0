"""Pickles that hold arrays and plain Python values, read without running code.

A pickle is a program that names functions for its reader to call. Here a name is looked up in a closed list, whose
members build numeric arrays of bytes that the file holds and do nothing else; any other name is refused. A crafted file
may still take much time or memory.
"""

import os
import pickle  # noqa: TID251  (this module is the restricted unpickler that the ban points to)
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ibaml.checks import expand_home


def load_arrays(path: str | os.PathLike[str]) -> Any:
    r"""Reads a pickle of containers, strings, bytes, numbers, None and numeric NumPy arrays, running no code.

    Protocols 0 to 5, of Python 2 as well (its byte strings become str, decoded as Latin-1, except in arrays).

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the pickle names a function or class that arrays do not need (which is how a pickle runs code),
            or is truncated or no pickle at all.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "labels.pickle"
        ...     _ = file.write_bytes(b"(dS'labels'\n(lI0\naI1\nas.")
        ...     load_arrays(file)
        {'labels': [0, 1]}
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "labels.pickle"
        ...     _ = file.write_bytes(b"cos\nsystem\n(S'echo oops'\ntR.")
        ...     load_arrays(file)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: labels.pickle is refused: it names os.system
    """
    path = expand_home("path", path)
    with path.open("rb") as file:
        try:
            # Latin-1 maps the 256 bytes to the first 256 code points, so that byte strings of Python 2 can be restored.
            return _ArrayUnpickler(file, encoding="latin1").load()
        except _RefusedError as error:
            raise ValueError(f"{path} is refused: {error}") from None
        except OSError:
            raise
        except Exception as error:
            # Bad bytes make the unpickler raise about anything (its documentation names five kinds, "and more").
            raise ValueError(
                f"{path} is not an intact pickle ({type(error).__name__}: {error}): probably a copy or download that "
                "broke off. Get it again."
            ) from error


class _RefusedError(Exception):
    """The pickle asks for something that could run code."""


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that calls functions of this module only, never those that the file names."""

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        """Looks the name up in the list; one with dots in it, which Python would follow, is only a name."""
        if (function := _functions.get((module_name, global_name))) is None:
            raise _RefusedError(
                f"it names {module_name}.{global_name}, and only containers, strings, numbers and numeric arrays are "
                "read from a pickle, because anything else could run code."
            )
        return function


class _Dtype:
    """A numeric dtype; its state brings the byte order. NumPy's own state could describe memory that is not there."""

    __slots__ = ("dtype",)

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufc":
            raise _RefusedError(f"it has an array of dtype {self.dtype}, and objects in an array could run code.")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes the byte order of ``(version, order, ...)``."""
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose contents come after it; NumPy's own state may be of any size and dtype."""

    def __setstate__(self, state: tuple[Any, ...], /) -> None:
        """Takes ``([version,] shape, dtype, is_fortran, raw)`` if the bytes fit."""
        shape, dtype, is_fortran, raw = state[-4:]
        content = _to_bytes(raw)
        values = _from_bytes(content, dtype, shape, "F" if is_fortran else "C")
        state = (1, values.shape, values.dtype, bool(is_fortran), content)
        super().__setstate__(state)  # pyright: ignore[reportArgumentType]  (the stub has numpy.bool)


def _to_bytes(raw: Any) -> bytes:
    if isinstance(raw, str):
        return raw.encode("latin1")
    # A number is no buffer; bytes of it would be as many zeros.
    return raw if isinstance(raw, bytes) else bytes(memoryview(raw))


def _from_bytes(raw: Any, dtype: _Dtype, shape: Any, order: Any, axes: Any = None) -> npt.NDArray[Any]:
    """Returns an array of all the bytes; order ``"K"`` is C order with its axes transposed."""
    values = np.frombuffer(_to_bytes(raw), dtype.dtype).reshape(shape, order="C" if order == "K" else order)
    return values.transpose(axes) if order == "K" and axes is not None else values


# No class and no function with defaults is handed out: a pickle may set attributes of what it gets.
_functions: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): lambda: None,
    ("numpy", "dtype"): lambda code, *_: _Dtype(code),
    ("_codecs", "encode"): lambda text, _: _to_bytes(text),
    ("builtins", "bytes"): lambda: b"",
    ("__builtin__", "bytes"): lambda: b"",
}
for _core in ("numpy.core", "numpy._core"):  # up to NumPy 1, and from 2 on
    _functions |= {
        (f"{_core}.multiarray", "_reconstruct"): lambda *_: _Array(0, "u1"),
        (f"{_core}.multiarray", "scalar"): lambda dtype, raw: _from_bytes(raw, dtype, (1,), "C")[0],
        (f"{_core}.numeric", "_frombuffer"): lambda *parts: _from_bytes(*parts),
    }
