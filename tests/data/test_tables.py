"""Tasks in all the forms that people have them in."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml.data.arrays import to_array
from ibaml.data.tables import read_inputs, read_labels, read_targets, read_tasks
from ibaml.types import Batch, Episode

X = np.arange(6.0).reshape(3, 2)


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {"school": ["b", "a", "b"], "age": [1, 2, 3], "boy": [True, False, True], "score": [0.5, 1.5, 2.5]}
    )


def test_pairs_mappings_and_batches_are_the_same():
    y = np.array([0, 1, 0])
    forms = [[(X, y)], {"0": (X, y)}, [Batch(torch.tensor(X), torch.tensor(y))], [[X.tolist(), y.tolist()]]]
    forms.append([(pd.DataFrame(X), pd.Series(y, index=[7, 8, 9]))])
    for form in forms:
        (task,) = read_tasks(form).tasks
        assert task.name == "0"
        np.testing.assert_array_equal(task.x, X)
        np.testing.assert_array_equal(task.y, y)


def test_a_long_table():
    read = read_tasks(table(), task="school", target="score")
    assert read.feature_names == ("age", "boy") and read.task_column == "school" and read.target_columns == ("score",)
    assert [task.name for task in read.tasks] == ["b", "a"]
    np.testing.assert_array_equal(read.tasks[0].x, [[1, 1], [3, 1]])
    assert read.tasks[0].y.tolist() == [0.5, 2.5]
    chosen = read_tasks(table(), task="school", target=["score", "boy"], features=["age"])
    assert chosen.tasks[0].y.shape == (2, 2) and chosen.tasks[0].x.shape == (2, 1)


def test_tables_keep_their_columns():
    read = read_tasks([(table()[["age", "boy"]], [1, 0, 1]), (table()[["boy", "age"]], [1, 0, 1])])
    assert read.feature_names == ("age", "boy")
    assert [name for name, _ in read.inputs] == ["X of task '0'", "X of task '1'"]


def test_rows_of_a_long_table_keep_their_numbers():
    read = read_tasks(table().set_index("age", drop=False), task="school", target="score")
    ((name, joined),) = read.inputs
    assert name == "the table" and joined.index.tolist() == [0, 2, 1] and joined.age.tolist() == [1, 3, 2]


def test_columns_named_by_integers():
    numbered = table().set_axis([0, 1, 2, 3], axis=1)
    read = read_tasks(numbered, task=0, target=3)
    assert read.feature_names == ("1", "2") and read.task_column == "0" and read.target_columns == ("3",)
    assert read.tasks[0].y.tolist() == [0.5, 2.5]
    assert read_tasks(numbered, task=np.int64(0), target=np.int64(3)).target_columns == ("3",)
    chosen = read_tasks(numbered, task=0, target=numbered.columns[:1:-1], features=[1])
    assert chosen.target_columns == ("3", "2")
    assert chosen.feature_names == ("1",) and chosen.tasks[0].y.shape == (2, 2)


def test_arrays_that_torch_would_refuse():
    frozen = X.copy()
    frozen.setflags(write=False)
    for x in (frozen, X[::-1], np.asfortranarray(X), X.astype(">f8"), X.astype(np.float16), X.astype(object)):
        np.testing.assert_array_equal(read_inputs("x", x), np.asarray(x, dtype=float))


def test_labels_keep_their_kind():
    assert read_labels("y", to_array(pd.Series(["a", "b"]))).dtype.kind == "U"
    assert read_labels("y", to_array(pd.Categorical(["a", "b"]).astype(object))).tolist() == ["a", "b"]
    assert read_labels("y", np.array([True, False])).dtype == bool
    assert read_labels("y", np.array([1, 2], dtype=object)).tolist() == [1, 2]
    assert read_labels("y", np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_targets_become_columns():
    assert read_targets("y", np.array([1, 2])).shape == (2, 1)
    assert read_targets("y", np.array([1.5, "2"], dtype=object)).tolist() == [[1.5], [2.0]]


@pytest.mark.parametrize(
    ("tasks", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "tasks is empty"),
        (7, {}, TypeError, "tasks must be a sequence of (X, y) pairs, a mapping"),
        ([X], {}, TypeError, "task '0' must be a pair (X, y), but is a ndarray."),
        ([(X,)], {}, TypeError, "task '0' must be a pair (X, y), but is a tuple of 1"),
        ([Episode(None, None)], {}, TypeError, "task '0' must be a pair (X, y), but is a Episode of 2"),
        ([(X, [1, 2])], {}, ValueError, "task '0' has 3 examples in X, but 2 targets in y"),
        ([(X, 1)], {}, ValueError, "task '0' has 3 examples in X, but a single value in y"),
        ([(X[:0], [])], {}, ValueError, "task '0' has no examples"),
        ({"k": (X[:, 0], [1, 2, 3])}, {}, ValueError, "X of task 'k' has shape (3,), but expected [num_examples, num"),
        ([(X[:, :0], [1, 2, 3])], {}, ValueError, "X of task '0' has no features"),
        (
            [(X, [1, 2, 3]), (X[:, :1], [1, 2, 3])],
            {},
            ValueError,
            "task '1' has inputs of shape (1,), task '0' of (2,)",
        ),
        (
            [(X * np.nan, [1, 2, 3])],
            {},
            ValueError,
            "X of task '0' has 6 missing (NaN) or infinite values, the first in",
        ),
        ([(X - np.inf, [1, 2, 3])], {}, ValueError, "infinite values, the first in row 0, column 0"),
        ([(X + 1j, [1, 2, 3])], {}, TypeError, "X of task '0' has dtype complex128, but expected real numbers"),
        ([([["a"], ["b"]], [1, 2])], {}, TypeError, "X of task '0' has dtype <U1, but expected real numbers"),
        (
            [(np.array([["a"], [1]], dtype=object), [1, 2])],
            {},
            TypeError,
            "X of task '0' holds values that are no numbe",
        ),
        ([([[1, 2], [3]], [1, 2])], {}, ValueError, "rows of different lengths make no array"),
        (
            [(X, [1, 2, 3])],
            {"task": "a"},
            TypeError,
            "task, target and features name columns of a pandas DataFrame, but",
        ),
        (table(), {}, ValueError, "a DataFrame needs task=..., the column that names the task of a row, and target"),
        (table(), {"task": "class", "target": "score"}, ValueError, "the table has no column class; its columns are"),
        (table(), {"task": "school", "target": "mark"}, ValueError, "the table has no column mark; its columns are"),
        (
            table(),
            {"task": "school", "target": "score", "features": ["score"]},
            ValueError,
            "features names score, which is the task or the target",
        ),
        (table()[["school", "score"]], {"task": "school", "target": "score"}, ValueError, "there is no feature column"),
        (table()[:0], {"task": "school", "target": "score"}, ValueError, "the table has no rows"),
        (
            pd.concat([table(), table()[["age"]]], axis=1),
            {"task": "school", "target": "score"},
            ValueError,
            "the table has several columns named age",
        ),
        (
            table().assign(school=["a", None, "b"]),
            {"task": "school", "target": "score"},
            ValueError,
            "column 'school' of the table is missing in 1 rows, the first is row 1: every row needs a task",
        ),
        (
            table().assign(score=pd.array([1, 2, None], dtype="Int64")),
            {"task": "school", "target": "score"},
            ValueError,
            "column 'score' of the table is missing in 1 rows, the first is row 2: every row needs a task",
        ),
        (
            [(X, [1, 2, 3]), (pd.DataFrame(X), [1, 2, 3])],
            {},
            TypeError,
            "X of task '1' has columns with names, that of task '0' has not: give all tasks as DataFrames or all as",
        ),
    ],
)
def test_what_it_refuses(tasks, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read_tasks(tasks, **arguments)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.zeros((2, 1)), ValueError, "y has shape (2, 1), but expected one class label per example"),
        (np.array(["a", None], dtype=object), ValueError, "y has 1 missing labels, the first in row 1"),
        (np.array(["a", 1], dtype=object), TypeError, "y has labels of the types int, str; expected only strings"),
        (np.array([0.5, 1.0]), ValueError, "y has labels that are no whole numbers, such as 0.5"),
        (np.array([0.0, np.nan]), ValueError, "y has 1 missing (NaN) or infinite values, the first in row 1"),
        (np.array([1j]), TypeError, "y has labels of dtype complex128"),
    ],
)
def test_labels_it_refuses(y, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read_labels("y", y)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.array(["a"]), TypeError, "y has dtype <U1, but expected real numbers: for class labels use"),
        (np.array(["a"], dtype=object), TypeError, "y holds values that are no numbers"),
        (np.zeros((1, 1, 1)), ValueError, "y has shape (1, 1, 1), but expected [num_examples] or"),
        (np.zeros((1, 0)), ValueError, "y has shape (1, 0), but expected [num_examples] or"),
        (np.array([np.inf]), ValueError, "y has 1 missing (NaN) or infinite values, the first in row 0"),
    ],
)
def test_targets_it_refuses(y, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read_targets("y", y)
