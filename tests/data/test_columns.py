"""Columns of a table as features: what becomes of numbers, categories and gaps, against pandas by hand."""

import datetime
import json
import re
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibaml.data.columns import MOST_CATEGORIES, Column, as_table, encode_columns, fit_columns, is_table, take
from ibaml.data.preprocessing import Preprocessing, encode_tasks, fit_preprocessing
from ibaml.data.tables import read_inputs, read_tasks


def animals() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "owner": ["ann", "ann", "ann", "bob", "bob", "bob"],
            "age": [1.0, None, 3.0, 4.0, None, 8.0],
            "kind": ["cat", "dog", "ape", "cat", "cat", "dog"],
            "sex": ["f", "m", "m", "f", "f", "m"],
            "tame": [True, False, True, True, True, False],
            "weight": [4.0, 20.0, 30.0, 5.0, 4.5, 25.0],
        }
    )


BY_HAND = np.array(
    # age, whether it is missing, ape, cat, dog, sex, tame
    [
        [1, 0, 0, 1, 0, 0, 1],
        [4, 1, 0, 0, 1, 1, 0],
        [3, 0, 1, 0, 0, 1, 1],
        [4, 0, 0, 1, 0, 0, 1],
        [4, 1, 0, 1, 0, 0, 1],
        [8, 0, 0, 0, 1, 1, 0],
    ],
    dtype=np.float64,
)
FEATURES = ("age", "kind", "sex", "tame")


def fitted(table: pd.DataFrame) -> Preprocessing:
    read = read_tasks(table, task="owner", target="weight")
    return fit_preprocessing(read, target_kind="real", classes="shared", num_ways=None)


def fit(table: pd.DataFrame, names=FEATURES) -> tuple[Column, ...]:
    return fit_columns(names, [("the table", table)])


def encode(columns, table) -> np.ndarray:
    (features,) = encode_columns(columns, [("x", as_table(table))])
    return features


# Oracles


def test_columns_become_features():
    columns = fit(animals())
    assert columns == (
        Column("age", mean=4.0, has_gaps=True),
        Column("kind", categories=("ape", "cat", "dog")),
        Column("sex", categories=("f", "m")),
        Column("tame", mean=pytest.approx(4 / 6)),
    )
    np.testing.assert_array_equal(encode(columns, animals()), BY_HAND)
    # In any order, beside other columns and under any index.
    other = animals()[["kind", "tame", "weight", "age", "sex"]].set_index("weight", drop=False)
    np.testing.assert_array_equal(encode(columns, other), BY_HAND)
    np.testing.assert_array_equal(encode(columns, animals()[:0]), BY_HAND[:0])


def test_a_table_is_what_its_features_by_hand_are():
    by_hand = pd.DataFrame(BY_HAND, columns=list("abcdefg")).assign(owner=animals().owner, weight=animals().weight)
    for splitting in (lambda table: (table, {"task": "owner", "target": "weight"}), as_pairs):
        encoded = []
        for table in (animals(), by_hand):
            tasks, columns = splitting(table)
            read = read_tasks(tasks, **columns)
            preprocessing = fit_preprocessing(read, target_kind="real", classes="shared", num_ways=None)
            encoded.append(encode_tasks(preprocessing, read, dtype=preprocessing.inputs.mean.dtype))
            assert preprocessing.input_shape == (7,)
        for found, expected in zip(*encoded, strict=True):
            np.testing.assert_allclose(found.x, expected.x, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(found.y, expected.y)


def as_pairs(table: pd.DataFrame):
    return [(group.drop(columns=["owner", "weight"]), group.weight) for _, group in table.groupby("owner")], {}


@pytest.mark.parametrize(
    "convert",
    [
        lambda table: table.astype({"kind": "category", "sex": "category"}),
        lambda table: table.assign(kind=pd.Categorical(table.kind, categories=["dog", "cat", "ape", "never"])),
        lambda table: table.astype({"kind": object, "sex": object, "age": object, "tame": object}),
        lambda table: table.astype({"kind": "string", "age": "Float64", "tame": "boolean"}),
        lambda table: table.astype({"kind": "string[pyarrow]", "age": "double[pyarrow]", "tame": "bool[pyarrow]"}),
        lambda table: table.astype({"age": "Int64", "tame": int}),
        lambda table: table.convert_dtypes(dtype_backend="pyarrow"),
        pa.Table.from_pandas,
        lambda table: pa.Table.from_pandas(table.astype({"kind": "category"})),
    ],
)
def test_dtypes_do_not_matter(convert):
    table = as_table(convert(animals()))
    assert fit(table) == fit(animals())
    np.testing.assert_array_equal(encode(fit(animals()), convert(animals())), BY_HAND)
    np.testing.assert_array_equal(encode(fit(table), animals()), BY_HAND)


def test_a_table_of_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    table = polars.DataFrame({name: animals()[name].to_numpy().tolist() for name in ("kind", "sex", "tame")})
    table = table.with_columns(age=polars.Series([1.0, None, 3.0, 4.0, None, 8.0]))
    assert is_table(table)
    np.testing.assert_array_equal(encode(fit(animals()), table), BY_HAND)


def test_gaps_among_categories():
    table = pd.DataFrame({"kind": ["a", None, "b", "a", None], "sex": ["f", "f", None, None, "f"]})
    columns = fit(table, ["kind", "sex"])
    assert [column.categories for column in columns] == [("a", "b", None), ("f", None)]
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]]
    np.testing.assert_array_equal(encode(columns, table), expected)
    np.testing.assert_array_equal(encode(columns, table.astype("category")), expected)


def test_categories_that_are_numbers():
    """A dtype of categories says that they are meant; a file without dtypes still finds them, also beside gaps."""
    table = pd.DataFrame(
        {"ward": pd.Categorical([10, 2, 10, 3, None]), "code": pd.Categorical(["1", "2", "2", "3", "3"])}
    )
    columns = fit(table, ["ward", "code"])
    assert [column.categories for column in columns] == [("10", "2", "3", None), ("1", "2", "3")]
    in_a_file = pd.DataFrame({"ward": [10.0, 2.0, 10.0, 3.0, np.nan], "code": [1, 2, 2, 3, 3]})
    np.testing.assert_array_equal(encode(columns, in_a_file), encode(columns, table))


def test_intervals_are_categories_as_pandas_cuts_them():
    ages = pd.cut(pd.Series([1, 2, 9, 10, 15]), [0, 5, 10, 20])
    (column,) = fit(pd.DataFrame({"age": ages}), ["age"])
    assert column.categories == ("(0, 5]", "(10, 20]", "(5, 10]")


CELLS = {
    "number": st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-1000, 1000)),
    "flag": st.booleans(),
    "name": st.one_of(st.none(), st.sampled_from(["red", "green", "blue", "", "1x", "Zoë"])),
}


@given(st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_any_table_is_as_pandas_encodes_it(rows, random):
    # Twice, so that no column tells every row apart.
    table = pd.DataFrame(rows * 2).astype({"number": float})
    names = [name for name in CELLS if table[name].notna().any()]
    columns = fit(table, names)
    expected = []
    for name in names:
        values = table[name]
        if name != "name":
            expected.append(values.astype(float).fillna(values.mean()).to_frame())
            expected += [values.isna().to_frame()] * bool(values.isna().any())
            continue
        dummies = pd.get_dummies(values.astype(object), dummy_na=bool(values.isna().any()))
        expected.append(dummies.iloc[:, 1:] if dummies.shape[1] == 2 else dummies)
    by_hand = pd.concat(expected, axis=1).to_numpy(dtype=np.float64)
    found = encode(columns, table)
    np.testing.assert_allclose(found, by_hand, rtol=1e-12, atol=1e-12 * 1e6)

    # The order of rows does not matter, nor how they are divided into tasks.
    order = [*range(len(table))]
    random.shuffle(order)
    shuffled = encode(columns, table.iloc[order])
    np.testing.assert_array_equal(shuffled, found[order])
    cut = random.randrange(len(table) + 1)
    parts = [("a", as_table(table[:cut])), ("b", as_table(table[cut:]))]
    np.testing.assert_array_equal(np.concatenate(encode_columns(columns, parts)), found)
    again = fit_columns(names, parts)
    assert [column[1::2] for column in again] == [column[1::2] for column in columns]


def test_a_stored_preprocessing_encodes_the_same():
    preprocessing = fitted(animals().assign(sex=["f", "m", None, "f", None, "m"]))
    settings = json.loads(json.dumps(preprocessing.settings(), sort_keys=True))
    restored = Preprocessing.restore(settings, preprocessing.tensors())
    assert restored.columns == preprocessing.columns
    table = animals()
    assert restored.encode_inputs("x", table).equal(preprocessing.encode_inputs("x", table))
    # As an earlier version stored it: columns of numbers, without gaps.
    del settings["columns"]
    assert Preprocessing.restore(settings, preprocessing.tensors()).columns == tuple(map(Column, FEATURES))


# What training has not seen


@pytest.mark.parametrize(
    ("table", "features", "message"),
    [
        (
            animals()[:1].assign(kind="emu"),
            [1, 0, 0, 0, 0, 0, 1],
            "column 'kind' holds 'emu', which training has not seen: it counts as none of the categories 'ape'",
        ),
        (animals()[:1].assign(kind=None), [1, 0, 0, 0, 0, 0, 1], "column 'kind' holds a missing value, which training"),
        (animals()[:1].assign(sex="x"), [1, 0, 0, 1, 0, 0.5, 1], "column 'sex' holds 'x', which training"),
        (
            animals()[:1].assign(tame=pd.array([None], dtype="boolean")),
            [1, 0, 0, 1, 0, 0, 4 / 6],
            "column 'tame' has missing values, and had none in training: its mean in training, 0.666667, stands for th",
        ),
    ],
)
def test_what_training_has_not_seen_is_a_warning(table, features, message):
    with pytest.warns(RuntimeWarning, match=re.escape(message)) as caught:
        found = encode(fit(animals()), table)
    assert len(caught) == 1
    np.testing.assert_allclose(found, [features])


def test_one_warning_for_all_tasks_and_values():
    columns = fit(animals())
    tables = [(name, as_table(animals().assign(kind=[name + str(i % 2) for i in range(6)]))) for name in "xyzuvw"]
    with pytest.warns(RuntimeWarning, match=r"holds 'x0', 'x1', .*, \.\.\. \(12 in all\), which") as caught:
        encode_columns(columns, tables)
    assert len(caught) == 1


def test_what_training_has_seen_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(animals())


# What is refused


def with_column(**column) -> pd.DataFrame:
    return animals().assign(**column)


REFUSED = [
    (
        with_column(age=["3.4", "1", "2", "3", None, "4"]),
        TypeError,
        "column 'age' of the training tasks holds numbers as text, such as '1' (5 of 5 different values): make numbers "
        "of them, table['age'] = pandas.to_numeric(table['age'], errors='coerce'), or, if they are names, of cat",
    ),
    (with_column(age=["3,4", "1,5", "n/a", "3,4", "2,5", "n/a"]), TypeError, "such as '1,5' (3 of 4 different values)"),
    (
        with_column(age=["2026-01-01", "2026-02-01", "?"] * 2),
        TypeError,
        "column 'age' of the training tasks holds dates as text, such as '2026-01-01' (2 of 3 different values): make "
        "numbers of them, for example table['age'] = (pandas.to_datetime(table['age']) - pandas.Timestamp('2020-01-01')"
        ").dt.days, or take .dt.month or .dt.weekday, or leave the column out.",
    ),
    (with_column(age=["24.12.2025", "1/2/26 10:00"] * 3), TypeError, "holds dates as text, such as '1/2/26 10:00'"),
    (with_column(age=["10:30", "2026-01-01T10:00:00Z"] * 3), TypeError, "holds dates as text, such as '10:30'"),
    (
        with_column(age=pd.to_datetime([None, "2026-01-02", None, None, None, None])),
        TypeError,
        "column 'age' of the table holds dates or times, such as '2026-01-02 00:00:00' (row 1): make numbers of them",
    ),
    (
        with_column(age=[datetime.date(2026, 1, 2)] * 6),
        TypeError,
        "'age' of the table holds dates or times, such as '20",
    ),
    (
        with_column(age=pd.to_timedelta([1] * 6, unit="s")),
        TypeError,
        "column 'age' of the table holds spans of time, such as '0 days 00:00:01' (row 0): make numbers of them, "
        "table['age'] = table['age'].dt.total_seconds(), or leave the column out.",
    ),
    (
        with_column(age=pd.Series(["x", 1, 2, 3, 4, 5], dtype=object)),
        TypeError,
        "column 'age' of the table has dtype object and holds values of the kind 'mixed-integer', such as 'x' (row 0) "
        "among numbers; expected only numbers, only text or categories: make all of one kind, with "
        "pandas.to_numeric or .astype(str)",
    ),
    (with_column(age=[1j] * 6), TypeError, "has dtype complex128 and holds values of the kind 'complex'"),
    (with_column(age=[[1], [2]] * 3), TypeError, "has dtype object and holds values of the kind 'mixed'"),
    (
        with_column(age=[1, 2, -np.inf, 4, np.inf, 6]),
        ValueError,
        "the table has 2 infinite values in column 'age', the first in row 2: drop or impute them.",
    ),
    (with_column(age=None), ValueError, "column 'age' has no values in the training tasks: leave it out."),
    (with_column(age=pd.to_datetime([None] * 6)), ValueError, "column 'age' has no values in the training tasks"),
    (
        with_column(kind=[*"abcdef"]),
        ValueError,
        "column 'kind' has 6 different values in 6 rows of the training tasks, such as 'a'; expected at most 50 "
        "categories, and some of them in several rows: leave the column out (features=[...]), or encode it",
    ),
    (animals()[["age", "kind", "sex"]], ValueError, "the table has no column tame; its columns are age, kind, sex"),
    (pd.concat([animals(), animals()[["age"]]], axis=1), ValueError, "the table has several columns named age: rename"),
]


@pytest.mark.parametrize(("table", "error", "message"), REFUSED, ids=[case[2][:60] for case in REFUSED])
def test_what_it_refuses(table, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fit(as_table(table))


@pytest.mark.parametrize("number", [MOST_CATEGORIES, MOST_CATEGORIES + 1])
def test_many_categories(number):
    table = pd.DataFrame({"kind": [f"kind {i}" for i in range(number)] * 2})
    if number == MOST_CATEGORIES:
        assert len(fit(table, ["kind"])[0].categories) == number
    else:
        with pytest.raises(ValueError, match="column 'kind' has 51 different values in 102 rows of the training tasks"):
            fit(table, ["kind"])


def test_text_in_one_task_and_numbers_in_another():
    tasks = [("X of task 'a'", pd.DataFrame({"x": [None, 1.0]})), ("X of task 'b'", pd.DataFrame({"x": ["u", "v"]}))]
    message = (
        "column 'x' holds numbers (row 1 of X of task 'a') and text (row 0 of X of task 'b'): make all of one kind, "
        "with pandas.to_numeric or .astype(str)."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        fit_columns(["x"], tasks)
    # A task with nothing but gaps is of any kind.
    tasks[0][1].loc[1, "x"] = None
    assert fit_columns(["x"], tasks * 2)[0].categories == ("u", "v", None)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (
            with_column(age="old"),
            TypeError,
            "column 'age' of x holds text, such as 'old' (row 0), but the model was trained on numbers: make",
        ),
        (with_column(age=pd.Categorical(["old"] * 6)), TypeError, "column 'age' of x holds categories, such as 'old'"),
        (with_column(age=pd.to_datetime(["2026"] * 6)), TypeError, "column 'age' of x holds dates or times, such as"),
        (with_column(kind=pd.to_datetime(["2026"] * 6)), TypeError, "column 'kind' of x holds dates or times, such as"),
        (with_column(age=np.inf), ValueError, "x has 6 infinite values in column 'age', the first in row 0"),
        (
            animals().drop(columns="kind"),
            ValueError,
            "x has no column kind; its columns are owner, age, sex, tame, weig",
        ),
    ],
)
def test_what_a_model_refuses(table, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fitted(animals()).encode_inputs("x", table)


def test_arrays_have_no_names():
    message = (
        "x has no names of columns (ndarray), but the model was trained on columns of categories or with missing "
        "values (age, kind, sex): pass a DataFrame."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        fitted(animals()).encode_inputs("x", BY_HAND)
    plain = fitted(animals()[["owner", "tame", "weight"]])
    assert plain.encode_inputs("x", BY_HAND[:, -1:]).equal(plain.encode_inputs("x", animals()))


def test_a_table_for_a_model_of_arrays():
    np.testing.assert_array_equal(read_inputs("x", animals()[["weight", "tame"]])[:2], [[4, 1], [20, 0]])
    message = "x has 2 missing values in column 'age', the first in row 1, but the model was trained without names"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_inputs("x", animals()[["age"]])


def test_rows_of_a_long_table_are_numbered_as_in_the_table():
    table = animals()[["owner", "tame", "weight"]]
    far = read_tasks(table.assign(tame=[0, 1, 0, 1, 0, 1e200]), task="owner", target="weight")
    with pytest.raises(
        ValueError, match="the table has values beyond the range of float32 after scaling, the first in row 5"
    ):
        encode_tasks(fitted(table), far)


def test_names_of_other_libraries_need_pandas(monkeypatch):
    class Table:
        columns = ("a",)

        def to_pandas(self):
            raise AssertionError("is asked for pandas first")

    assert is_table(Table()) and is_table(animals()) and not is_table(np.zeros((1, 1))) and not is_table(animals().age)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"this needs pandas, which is not installed: pip install 'ibaml\[tables\]'"):
        as_table(Table())


def test_columns_are_taken_by_name():
    first, second = take("x", animals(), ["sex", "age"])
    assert first.name == "sex" and second.name == "age"
