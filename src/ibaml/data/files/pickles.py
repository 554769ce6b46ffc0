"""Reads pickles that hold data alone (containers, strings, numbers, numeric arrays) without running code.

A pickle is a program for a small stack machine, and its author chooses which functions of the reader's Python it
calls. Three layers keep a foreign one harmless:

- The bytes are scanned before any object is made. Operations that data never needs are refused, and so are lengths and
  memo places far beyond the file (a few bytes could otherwise claim gigabytes) and tuples as dict keys (nested ones can
  overflow the C stack, or take for ever, when hashed).
- ``find_class`` knows seven names and hands out functions of this module, never the real ones; nothing is imported.
  They build arrays from plain bytes whose number must fit the shape, of numeric dtypes only.
- The result is walked through, and anything but data in it is refused.

What remains: reading a crafted file may take long, though it takes no memory out of proportion to its size.
"""

import mmap
import os
import pickle  # noqa: TID251  (this module is the restricted unpickler that the ban points to)
import pickletools
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

_MULTIARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTIN_MODULES = ("builtins", "__builtin__")

_DTYPE_CODE = re.compile(r"[<>|=]?(\?|b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32))")

# Extensions (looked up in a registry of the running program, or in a cache that no hook sees), persistent ids, buffers
# kept outside the file, and sets.
_REFUSED_OPCODES = frozenset(
    {
        *("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
        *("EMPTY_SET", "ADDITEMS", "FROZENSET"),
    }
)

# A memo has 16 bytes for every place up to the largest in use. Writers number the places from 0 on; optimised pickles
# leave gaps, hence the allowance.
_SPARE_MEMO_PLACES = 1 << 20


class _Refusal(Exception):
    """Something in the file that data never needs; the message says what."""


def load_arrays(path: str | os.PathLike[str]) -> object:
    r"""Reads a pickle of dicts, lists, tuples, strings, bytes, numbers, None and numeric NumPy arrays, running no code.

    Protocols 0 to 5, of Python 2 as well (its byte strings become str, decoded as Latin-1, except in arrays). Dict
    keys may be strings, bytes, numbers or None. Complex numbers outside arrays, sets, and arrays of objects, strings,
    dates or records are not among what is read.

    Args:
        path: The file.

    Returns:
        What the pickle holds. Its arrays are read-only; copy what you want to change.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the pickle names any function or class that data does not need (which is how a pickle runs code),
            declares more than the file holds, is truncated or is no pickle at all.

    Cost: Memory of about once the file's size; three times in protocols 0 to 2, where bytes are written as text.

    Examples:
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
    path = Path(path).expanduser()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError(f"{path} is empty: probably a copy or download that broke off. Get it again.")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_program(data)
            return _Finisher().finish(_ArrayUnpickler(file, max_num_bytes=size).load())
        except _Refusal as error:
            raise ValueError(
                f"{path} is refused: {error}. Only containers, strings, numbers and numeric arrays are read from a "
                "pickle, because anything else could run code."
            ) from None
        except OSError:
            raise
        except Exception as error:
            # Bad bytes make the unpickler raise about anything (its documentation names five kinds, "and more").
            raise ValueError(
                f"{path} is not an intact pickle ({type(error).__name__}: {error}): probably a copy or download that "
                "broke off. Get it again."
            ) from error


class _Opcode(NamedTuple):
    """What the scan has to know of an operation."""

    name: str
    argument_size: int  # as in pickletools: a number of bytes, or a negative code
    num_lines: int  # for arguments that end with a line
    uses_mark: bool
    num_popped: int  # besides what lies above the mark
    pushes: tuple[bool, ...]  # for each result whether it is a tuple


def _opcode_table() -> dict[int, _Opcode]:
    """Condenses the standard library's description of the pickle machine."""
    table: dict[int, _Opcode] = {}
    for info in pickletools.opcodes:
        before = [kind.name for kind in info.stack_before]
        table[ord(info.code)] = _Opcode(
            name=info.name,
            argument_size=0 if info.arg is None else info.arg.n,
            num_lines=2 if info.name in ("GLOBAL", "INST") else 1,
            uses_mark="mark" in before,
            num_popped=before.index("mark") if "mark" in before else len(before),
            pushes=tuple(kind.name == "tuple" for kind in info.stack_after),
        )
    return table


_OPCODES = _opcode_table()
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _check_program(data: mmap.mmap) -> None:
    """Walks through the operations up to STOP without carrying them out.

    Only one thing is tracked of the objects on the machine's stack and in its memo: which of them are tuples.
    """
    size = len(data)
    is_tuple: list[bool] = []
    marks: list[int] = []
    memo: dict[int, bool] = {}
    position = 0
    while True:
        start = position
        if start >= size:
            raise EOFError(f"it ends after {size} bytes, amid its data")
        if (opcode := _OPCODES.get(data[start])) is None:
            page = ", perhaps a web page saved under its name" if data[:1] == b"<" else ""
            raise ValueError(f"byte {start} is {data[start : start + 1]!r}, which no pickle has there{page}")
        name = opcode.name
        if name in _REFUSED_OPCODES:
            raise _Refusal(f"it uses the operation {name} at byte {start}")
        position = _skip_argument(data, start + 1, opcode)
        if position > size:
            raise EOFError(f"the {name} at byte {start} needs {position - size} bytes more than the file has")

        bottom = marks[-1] if marks else 0
        if name == "STOP":
            return
        if name == "MARK":
            marks.append(len(is_tuple))
        elif name == "POP" and marks and bottom == len(is_tuple):
            marks.pop()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else _memo_place(data[start + 1 : position], name)
            if place > size + _SPARE_MEMO_PLACES:
                raise _Refusal(f"it numbers an object {place} at byte {start}, beyond what the file can hold")
            if len(is_tuple) <= bottom:
                raise EOFError(f"the {name} at byte {start} has nothing to store")
            memo[place] = is_tuple[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            is_tuple.append(memo[_memo_place(data[start + 1 : position], name)])
        elif name == "DUP":
            is_tuple.append(is_tuple[-1])
        else:
            end = len(is_tuple)
            if opcode.uses_mark:
                end = marks.pop()
                bottom = marks[-1] if marks else 0
            first = end - opcode.num_popped
            if first < bottom:
                raise EOFError(f"the {name} at byte {start} lacks operands")
            items = is_tuple[first + 1 :] if name in ("SETITEM", "SETITEMS") else is_tuple[first:]
            if name in ("SETITEM", "SETITEMS", "DICT") and any(items[::2]):
                raise _Refusal(f"it has a dict with a tuple for a key at byte {start}")
            is_tuple[first:] = opcode.pushes


def _skip_argument(data: mmap.mmap, position: int, opcode: _Opcode) -> int:
    """Returns where the argument that starts at ``position`` ends; beyond the end of the data if it is cut off."""
    if opcode.argument_size == pickletools.UP_TO_NEWLINE:
        for _ in range(opcode.num_lines):
            if (newline := data.find(b"\n", position)) < 0:
                return len(data) + 1
            position = newline + 1
        return position
    if (length_bytes := _LENGTH_BYTES.get(opcode.argument_size)) is None:
        return position + opcode.argument_size
    signed = opcode.argument_size == pickletools.TAKEN_FROM_ARGUMENT4
    length = int.from_bytes(data[position : position + length_bytes], "little", signed=signed)
    if length < 0:
        raise ValueError(f"the {opcode.name} at byte {position - 1} declares a negative length")
    return position + length_bytes + length


def _memo_place(argument: bytes, name: str) -> int:
    """Returns the memo place that an operation refers to."""
    return int(argument) if name in ("GET", "PUT") else int.from_bytes(argument, "little")


class _Function:
    """What a pickle gets for a name: it can be called, and nothing else.

    A plain function would not do: BUILD sets attributes of any object that lets it, such as a function's defaults.
    """

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Callable[..., object]) -> None:
        self._name = name
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        """Refuses BUILD."""
        raise _Refusal(f"it changes {self._name}")


class _DtypeDraft:
    """A dtype on its way: the type code comes first, the byte order with BUILD."""

    __slots__ = ("_built", "value")

    def __init__(self, value: np.dtype[np.generic]) -> None:
        self._built = False
        self.value = value

    def __setstate__(self, state: object) -> None:
        """Takes the byte order from a state ``(version, order, subarray, names, fields, ...)`` without the latter."""
        parts = _parts(state)
        plain = len(parts) >= 5 and all(part is None for part in parts[2:5])
        order = parts[1] if len(parts) >= 2 else None
        if self._built or not plain or not isinstance(order, str) or order not in ("<", ">", "|", "="):
            raise _Refusal("it has a dtype that is not a plain number")
        self._built = True
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _ArrayDraft:
    """An array on its way: BUILD brings shape, dtype and contents, unless they came with the call."""

    __slots__ = ("_make", "value")

    def __init__(
        self,
        make: Callable[[object, object, object, str], npt.NDArray[np.generic]],
        value: npt.NDArray[np.generic] | None = None,
    ) -> None:
        self._make = make
        self.value = value

    def __setstate__(self, state: object) -> None:
        """Takes the state ``([version,] shape, dtype, is_fortran, raw)`` of ``numpy.ndarray.__reduce__``."""
        parts = _parts(state)[-4:]
        if self.value is not None or len(parts) != 4:
            raise _Refusal("it has an array with an unknown state")
        shape, dtype, is_fortran, raw = parts
        self.value = self._make(raw, dtype, shape, "F" if is_fortran is True or is_fortran == 1 else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that calls functions of this module only."""

    def __init__(self, file: object, *, max_num_bytes: int) -> None:
        # Latin-1 maps the 256 bytes to the first 256 code points, so that byte strings of Python 2 can be restored.
        super().__init__(file, encoding="latin1")  # pyright: ignore[reportArgumentType]
        # No conversion makes more bytes than there are in the file, unless the file has one object converted over and
        # over to exhaust the memory.
        self._num_bytes_left = max_num_bytes
        self._ndarray = _Function("numpy.ndarray", _refuse_ndarray)
        functions: dict[tuple[str, str], Callable[..., object]] = {
            ("numpy", "dtype"): self._dtype,
            ("_codecs", "encode"): self._encode,
        }
        functions |= {(module, "_reconstruct"): self._reconstruct for module in _MULTIARRAY_MODULES}
        functions |= {(module, "scalar"): self._scalar for module in _MULTIARRAY_MODULES}
        functions |= {(module, "_frombuffer"): self._frombuffer for module in _NUMERIC_MODULES}
        functions |= {(module, "bytes"): _empty_bytes for module in _BUILTIN_MODULES}
        self._functions = {names: _Function(".".join(names), call) for names, call in functions.items()}
        self._functions["numpy", "ndarray"] = self._ndarray

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Looks a name up in a table; a name with dots in it, which Python would follow, is only a name."""
        if (function := self._functions.get((module_name, global_name))) is None:
            raise _Refusal(f"it names {f'{module_name}.{global_name}'[:200]}, which data does not need")
        return function

    def persistent_load(self, pid: object) -> object:
        """Refuses references to what is kept outside the file."""
        raise _Refusal("it refers to an object outside the file")

    def _dtype(self, *arguments: object) -> _DtypeDraft:
        """Stands for ``numpy.dtype(code, align, copy)``."""
        code = arguments[0] if arguments else None
        if not isinstance(code, str) or not _DTYPE_CODE.fullmatch(code):
            shown = repr(code[:20]) if isinstance(code, str) else f"a {type(code).__name__}"
            raise _Refusal(f"it has an array or scalar that is not numeric (dtype {shown})")
        return _DtypeDraft(np.dtype(code))

    def _encode(self, *arguments: object) -> bytes:
        """Stands for ``_codecs.encode(text, "latin1")``, as which bytes are written in protocols 0 to 2."""
        if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
            raise _Refusal("it calls _codecs.encode for something else than bytes")
        return self._raw(arguments[0])

    def _reconstruct(self, *arguments: object) -> _ArrayDraft:
        """Stands for ``_reconstruct(numpy.ndarray, (0,), typecode)``; the contents follow in BUILD."""
        if len(arguments) != 3 or arguments[0] is not self._ndarray or arguments[1] != (0,):
            raise _Refusal("it has an array of an unknown kind")
        return _ArrayDraft(self._make_array)

    def _frombuffer(self, *arguments: object) -> _ArrayDraft:
        """Stands for ``_frombuffer(buffer, dtype, shape, order, axis_order)``, as which protocol 5 writes arrays."""
        if len(arguments) not in (4, 5):
            raise _Refusal("it has an array of an unknown kind")
        raw, dtype, shape, order, *axes = arguments
        if order == "K" and axes:
            array = self._make_array(raw, dtype, shape, "C").transpose(_integers(axes[0], "axes"))
        elif order in ("C", "F") and not any(axes):
            array = self._make_array(raw, dtype, shape, cast(str, order))
        else:
            raise _Refusal("it has an array with an unknown memory order")
        return _ArrayDraft(self._make_array, array)

    def _scalar(self, *arguments: object) -> np.generic:
        """Stands for ``scalar(dtype, raw)``."""
        if len(arguments) != 2:
            raise _Refusal("it has a scalar of an unknown kind")
        return self._make_array(arguments[1], arguments[0], (1,), "C")[0]

    def _make_array(self, raw: object, dtype: object, shape: object, order: str) -> npt.NDArray[np.generic]:
        """Makes an array of bytes that are in the file; a shape alone claims no memory."""
        if not isinstance(dtype, _DtypeDraft):
            raise _Refusal("it has an array without a dtype")
        sides = _integers(shape, "shape")
        content = self._raw(raw) if isinstance(raw, str) else raw
        if not isinstance(content, bytes | bytearray):
            raise _Refusal(f"it has an array made of a {type(raw).__name__}")
        if min(sides, default=0) < 0 or prod(sides) * dtype.value.itemsize != len(content):
            raise ValueError(f"an array of shape {sides[:32]} and dtype {dtype.value} has {len(content)} bytes")
        array = np.frombuffer(content, dtype.value).reshape(sides, order="F" if order == "F" else "C")
        array.flags.writeable = False
        return array

    def _raw(self, text: str) -> bytes:
        """Restores the bytes that Latin-1 made text of."""
        self._num_bytes_left -= len(text)
        if self._num_bytes_left < 0:
            raise _Refusal("it converts the same text to bytes many times over")
        return text.encode("latin1")


def _refuse_ndarray(*arguments: object) -> object:
    """Stands for ``numpy.ndarray``, which arrays only mention: called, it would hand out memory as it lies."""
    raise _Refusal("it calls numpy.ndarray")


def _empty_bytes(*arguments: object) -> bytes:
    """Stands for ``bytes()``, as which no bytes are written in protocols 0 to 2."""
    if arguments:
        raise _Refusal("it calls bytes with arguments")
    return b""


def _parts(state: object) -> tuple[object, ...]:
    """Returns a state that has to be a tuple."""
    return cast("tuple[object, ...]", state) if isinstance(state, tuple) else ()


def _integers(value: object, what: str) -> tuple[int, ...]:
    """Returns a tuple of integers, as shapes and axes are (Python 2 has two integer types, Python 3 reads one)."""
    if not isinstance(value, tuple) or len(value) > 64:  # as many axes as NumPy has
        raise _Refusal(f"it has an array with an impossible {what}")
    numbers: list[int] = []
    for number in cast("tuple[object, ...]", value):
        if type(number) is not int:
            raise _Refusal(f"it has an array with a {type(number).__name__} in its {what}")
        numbers.append(number)
    return tuple(numbers)


_UNFINISHED: dict[type, str] = {
    _ArrayDraft: "an unfinished array",
    _DtypeDraft: "a dtype without an array",
    _Function: "a function",
}


class _Finisher:
    """Copies the containers of a loaded object, drafts replaced by their arrays, and refuses all that is not data."""

    def __init__(self) -> None:
        # By identity, because an object may occur in many places (naming it twice at each of many levels would
        # otherwise take exponential time) and because equality of foreign objects is not to be relied on.
        self._done: dict[int, object] = {}
        self._open: set[int] = set()

    def finish(self, item: object) -> object:
        """Returns the finished object; the caller keeps the unfinished one alive, so that identities stay unique."""
        kind = type(item)
        if kind in (str, bytes, int, float, bool, type(None)) or isinstance(item, np.number | np.bool_):
            return item
        if isinstance(item, _ArrayDraft) and item.value is not None:
            return item.value
        if kind not in (dict, list, tuple):
            shown = _UNFINISHED.get(kind, f"a {kind.__name__}")
            raise _Refusal(f"it holds {shown}")
        key = id(item)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            raise _Refusal(f"it holds a {kind.__name__} that contains itself")
        self._open.add(key)
        if kind is dict:
            pairs = cast("dict[object, object]", item).items()
            finished: object = {self._finish_key(name): self.finish(value) for name, value in pairs}
        elif kind is list:
            finished = [self.finish(value) for value in cast("list[object]", item)]
        else:
            finished = tuple([self.finish(value) for value in cast("tuple[object, ...]", item)])
        self._open.discard(key)
        self._done[key] = finished
        return finished

    def _finish_key(self, name: object) -> object:
        """Returns a dict key, which is a string or number."""
        if isinstance(name, _ArrayDraft):
            raise _Refusal("it has a dict with an array for a key")
        return self.finish(name)
