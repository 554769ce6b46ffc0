"""What arrays are made of: nothing that values mean is dropped without a word."""

import array
import collections

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ibaml.data.arrays import as_tensor, to_array
from ibaml.data.tables import read_inputs, read_labels, read_targets

NUMBERS = [1.0, 2.0, 3.0]


class WithUnits(np.ndarray):
    """As libraries of physical units derive them."""


class Readable:
    """Something of an unknown library that numpy could read."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.array(NUMBERS)


@pytest.mark.parametrize(
    "value",
    [
        NUMBERS,
        tuple(NUMBERS),
        collections.deque(NUMBERS),
        array.array("d", NUMBERS),
        range(1, 4),
        np.array(NUMBERS),
        np.array(NUMBERS, dtype=">f8"),
        np.array(NUMBERS, dtype=np.longdouble),
        np.array(NUMBERS, dtype=">i2"),
        np.ma.masked_array(NUMBERS, mask=False),
        [np.ma.masked_array(one) for one in NUMBERS],
        torch.tensor(NUMBERS, requires_grad=True),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        torch.tensor(NUMBERS, dtype=torch.float8_e4m3fn),
        [torch.tensor(one, dtype=torch.bfloat16) for one in NUMBERS],
        pd.Series(NUMBERS),
        pd.Index(NUMBERS),
        pd.array([1, 2, 3], dtype="Int64"),
        pd.Series(NUMBERS, dtype="Float32"),
        pa.array(NUMBERS),
        pa.chunked_array([NUMBERS]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_that_are_taken(value: object):
    found = to_array(value)
    assert found.tolist() == NUMBERS and found.dtype.isnative and found.dtype.itemsize <= 8
    np.testing.assert_array_equal(read_targets("y", found), np.array(NUMBERS)[:, None])


MASK = [False, True, False]
MASKED_ROWS = np.ma.masked_array([[1.0, 2.0], [-9999.0, 3.0]], mask=[[0, 0], [1, 0]])


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array([1.0, -9999.0, 3.0], mask=MASK),
        np.ma.masked_array([1, -9999, 3], mask=MASK),
        np.ma.masked_array([1, 0, 3], mask=MASK, dtype=np.uint8),
        np.ma.masked_array([1, -9999, 3], mask=MASK, dtype=">f4"),
        [np.ma.masked_array(1.0), np.ma.masked_array(-9999.0, mask=True), np.ma.masked_array(3.0)],
        pd.array([1, None, 3], dtype="Int64"),
        pa.array([1, None, 3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_masked_and_missing_numbers_are_missing(value: object):
    found = to_array(value)
    np.testing.assert_array_equal(found, [1.0, np.nan, 3.0])
    with pytest.raises(ValueError, match="y has 1 missing .* the first in row 1: drop or impute them"):
        read_targets("y", found)
    # Of several targets some may not be measured.
    two = np.array([[1.0, 2.0], [3.0, np.nan]])
    np.testing.assert_array_equal(read_targets("y", two), two)
    with pytest.raises(ValueError, match="y has 1 rows of which no target was measured, the first is row 1: drop them"):
        read_targets("y", np.array([[1.0, 2.0], [np.nan, np.nan]]))


def test_masks_of_inputs_and_labels():
    for rows in (MASKED_ROWS, list(MASKED_ROWS), MASKED_ROWS.astype(int)):
        with pytest.raises(ValueError, match="X has 1 missing .* the first in row 1, column 0"):
            read_inputs("X", rows)
    assert to_array(np.ma.masked_array(["a", "b"], mask=[1, 0])).tolist() == [None, "b"]
    with pytest.raises(ValueError, match="y has 1 missing labels, the first in row 1"):
        read_labels("y", to_array(np.ma.masked_array(["a", "none"], mask=[0, 1])))
    with pytest.raises(ValueError, match="y has 1 missing"):
        read_labels("y", to_array(np.ma.masked_array([0, -1], mask=[0, 1])))
    # An empty mask changes nothing, not even the dtype.
    assert to_array(np.ma.masked_array([1, 2])).dtype == np.int64


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_masked_tensors_are_missing_where_they_are_masked():
    masked = torch.masked.masked_tensor(torch.tensor([1.0, -9999.0]), torch.tensor([True, False]))
    np.testing.assert_array_equal(to_array(masked), [1.0, np.nan])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(NUMBERS).view(WithUnits), "X is a WithUnits of .*units or missing values: pass an array of numpy"),
        (Readable(), "X is a Readable of .*units or missing values"),
        (torch.tensor(NUMBERS).to_sparse(), r"X is a sparse tensor; .*to_dense\(\)"),
    ],
)
def test_other_kinds_are_refused_by_name(value: object, message: str):
    with pytest.raises(TypeError, match=message):
        to_array(value, "X")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_tensors_are_refused():
    with pytest.raises(TypeError, match=r"X is a quantised tensor; .*dequantize\(\)"):
        to_array(torch.quantize_per_tensor(torch.tensor(NUMBERS), 0.1, 0, torch.qint8), "X")


def test_numbers_among_text_stay_numbers():
    assert to_array([1, "a"]).tolist() == [1, "a"]
    with pytest.raises(TypeError, match="y has labels of the types int, str"):
        read_labels("y", to_array([1, "a"]))


def test_labels_that_numpy_would_merge():
    assert read_labels("y", np.array([2**53, 2**53 + 1], np.uint64)).tolist() == [2**53, 2**53 + 1]
    with pytest.raises(ValueError, match="y has the integer 18446744073709551615, beyond the range of int64"):
        read_labels("y", np.array([2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match=r"y has the label 9.0072e\+15, and whole numbers that large"):
        read_labels("y", np.array([2.0**53 + 2]))
    with pytest.raises(
        ValueError, match="numbers that large are not all different in float32: give labels as integers"
    ):
        read_labels("y", np.array([2**24 + 2], np.float32))
    with pytest.raises(ValueError, match=r"y has the label 'a\\x00', which ends in a zero character"):
        read_labels("y", np.array(["a\0", "a"], dtype=object))


def test_tensors_of_arrays():
    assert as_tensor("x", np.array([1, 2], np.uint16)).dtype == torch.int64
    assert as_tensor("x", np.array([1, 2], np.uint8)).dtype == torch.uint8
    assert as_tensor("x", np.array([1.0], ">f8")).tolist() == [1.0]
    assert as_tensor("x", np.ma.masked_array([1.0], mask=False)).tolist() == [1.0]
    with pytest.raises(ValueError, match="x has 1 masked values, the first in row 1: drop or impute them"):
        as_tensor("x", MASKED_ROWS)
    with pytest.raises(TypeError, match="x is a WithUnits"):
        as_tensor("x", np.array(NUMBERS).view(WithUnits))
    with pytest.raises(ValueError, match="x has the integer .* beyond the range of int64"):
        as_tensor("x", np.array([2**64 - 1], np.uint64))
