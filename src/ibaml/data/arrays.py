"""Arrays of anything that holds values: a closed list of kinds, so that nothing which values mean is dropped.

numpy, torch, pandas, polars, Arrow and sequences of numbers or text are taken. What is masked is missing. Other objects
that numpy could turn into an array, such as those with units, are refused by name: numpy would keep the values alone.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from ibaml.data.columns import Array, as_table, is_table

_FAR = 1e4
_LIBRARIES = ("array", "builtins", "collections", "numpy", "pandas", "polars", "pyarrow")


def to_array(value: Any, argument: str = "a value") -> Array:
    """Returns a numpy array in the machine's byte order of anything that holds values.

    Masked values are missing: NaN among numbers, None elsewhere. Missing values of tables likewise.

    Args:
        value: An array of numpy or torch, a table or column of pandas, polars or Arrow, or sequences of such.
        argument: How messages call it.

    Raises:
        TypeError: If it is something else, or a tensor that is sparse or quantised.
        ValueError: If rows of nested lists differ in length.

    Examples:
        >>> to_array(np.ma.masked_equal([1, -9999], -9999))
        array([ 1., nan])
    """
    if isinstance(value, torch.Tensor):
        return _of_tensor(argument, value)
    value = as_table(value) if is_table(value) else value
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.api.extensions.ExtensionArray):
        value = pandas.Series(value)
    if pandas is not None and isinstance(value, pandas.Series | pandas.DataFrame | pandas.Index):
        return _of_pandas(value, pandas)
    if isinstance(value, np.ma.MaskedArray):
        return _without_mask(value)
    _require_known(argument, value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        # numpy would drop the masks of what a list holds.
        held: Sequence[Any] = value
        if any(isinstance(item, np.ma.MaskedArray | torch.Tensor) for item in held):
            value = [to_array(item, argument) for item in held]
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"rows of different lengths make no array ({error}): give every row as many values."
        ) from error
    if array.ndim == 1 and array.dtype.kind == "U" and not isinstance(value, np.ndarray):
        # numpy would turn numbers among text into text.
        array = array if all(isinstance(item, str) for item in value) else np.asarray(value, dtype=object)
    # torch takes no other byte order, and no floating-point numbers of more than eight bytes.
    return array.astype(_native(array.dtype), copy=False)


def as_tensor(argument: str, value: object) -> torch.Tensor:
    """Returns a tensor, or a numeric array as one.

    Args:
        argument: How messages call the value.
        value: What came.

    Raises:
        TypeError: If it is neither.
        ValueError: If values are masked, or integers beyond the range of int64.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        mask = np.ma.getmaskarray(value)
        if bool(mask.any()):
            raise ValueError(
                f"{argument} has {mask.sum()} masked values, the first in row {int(np.argwhere(mask)[0][0])}: drop or "
                "impute them."
            )
        # A copy: torch warns about read-only arrays and refuses negative strides.
        array = np.array(to_array(value, argument))
        # Few operations of torch take unsigned integers of more than a byte.
        return torch.from_numpy(to_int64(argument, array) if array.dtype.kind == "u" and array.itemsize > 1 else array)
    raise TypeError(
        f"{argument} must be a torch.Tensor or numeric numpy array, got {type(value).__name__}; "
        "convert it with torch.as_tensor."
    )


def num_positions(x: Any, num_examples: int) -> int:
    """Returns how many inputs a tuple holds side by side; 0 if it holds examples, or is no tuple of arrays.

    A tuple of arrays may be either. It holds inputs if each of them has an entry for every example, unless there are as
    many of them as examples.

    Args:
        x: What came as inputs.
        num_examples: Number of targets that came with it.

    Examples:
        >>> ids, mask = np.zeros((3, 5), int), np.ones((3, 5), int)
        >>> num_positions((ids, mask), 3), num_positions((ids, mask), 2), num_positions([ids, mask], 3)
        (2, 0, 0)
    """
    if not isinstance(x, tuple) or len(members := cast("tuple[Any, ...]", x)) in (1, num_examples):
        return 0
    are_inputs = all(
        isinstance(each, np.ndarray | torch.Tensor) and each.ndim and len(each) == num_examples for each in members
    )
    return len(members) if are_inputs else 0


def to_int64(argument: str, values: Array) -> Array:
    """Returns integers as int64.

    Raises:
        ValueError: If one is larger than int64 holds.
    """
    if values.dtype == np.uint64 and bool((values > np.iinfo(np.int64).max).any()):
        raise ValueError(
            f"{argument} has the integer {values.max()}, beyond the range of int64: give smaller ones, or text."
        )
    return values.astype(np.int64)


def warn_if_far(argument: str, scaled: Array, rows: Any) -> None:
    """Warns of values that are so far from those of training that nothing learned from these says much of them."""
    far = np.abs(scaled) > _FAR
    if bool(far.any()):
        place = np.unravel_index(np.nanargmax(np.abs(scaled)), scaled.shape)
        row = place[0] if rows is None else rows[place[0]]
        warnings.warn(
            f"{argument} has {far.sum()} values more than {_FAR:g} standard deviations of training away from its mean, "
            f"the farthest by {abs(scaled[place]):.3g} in row {row}, column {', '.join(map(str, place[1:]))}: if it is "
            "a fill value, drop or impute it; if not, check its units.",
            RuntimeWarning,
            stacklevel=2,
        )


def _of_tensor(argument: str, value: torch.Tensor) -> Array:
    if hasattr(value, "get_mask"):
        masked: Any = value
        return _without_mask(np.ma.masked_array(to_array(masked.get_data()), ~masked.get_mask().numpy()))
    if value.layout != torch.strided or value.is_quantized:
        kind, method = ("quantised", "dequantize") if value.is_quantized else ("sparse", "to_dense")
        raise TypeError(f"{argument} is a {kind} tensor; expected a dense one of real numbers: call its {method}().")
    value = value.detach().cpu()
    # numpy has no dtype for bfloat16 and the like.
    narrow = value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64)
    return (value.float() if narrow else value).numpy()


def _of_pandas(value: Any, pandas: Any) -> Array:
    # Nullable integers and strings become objects otherwise, missing ones pandas.NA.
    kinds = set(value.dtypes) if isinstance(value, pandas.DataFrame) else {value.dtype}
    if all(pandas.api.types.is_numeric_dtype(kind) for kind in kinds):
        if kinds == {np.dtype(bool)}:
            return value.to_numpy()
        if not bool(np.any(pandas.isna(value))):
            return value.to_numpy()
        return value.to_numpy(dtype=np.float64, na_value=np.nan)
    array = value.to_numpy(dtype=object)
    return np.asarray(np.where(np.asarray(pandas.isna(value)), None, array))


def _without_mask(value: Any) -> Array:
    """Returns the values of a masked array, those that are masked as missing."""
    mask = np.ma.getmaskarray(value)
    values = np.asarray(value.data)
    values = values.astype(_native(values.dtype), copy=False)
    if not bool(mask.any()):
        return values
    if values.dtype.kind in "biuf":
        return np.where(mask, np.nan, values)
    missing = values.astype(object)
    missing[mask] = None
    return missing


def _require_known(argument: str, value: Any) -> None:
    """Refuses what is of no library whose values are known to mean what numpy makes of them."""
    library = type(value).__module__.split(".")[0]
    is_sequence = isinstance(value, Sequence) or np.isscalar(value)
    if (isinstance(value, np.ndarray) or not is_sequence) and library not in _LIBRARIES:
        raise TypeError(
            f"{argument} is a {type(value).__name__} of {library}, and numpy would keep its values but not what else "
            "it says, such as units or missing values: pass an array of numpy or torch, or a table or column of "
            "pandas, polars or Arrow."
        )


def _native(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    is_long = dtype.kind == "f" and dtype.itemsize > 8
    return np.dtype(np.float64) if is_long else dtype.newbyteorder("=")
