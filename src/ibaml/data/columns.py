"""Columns of a table as features: numbers with their gaps filled, categories as indicators.

What becomes of a column is found on the training tasks, once, and is part of the model:

| column | features |
|---|---|
| numbers | the numbers, and for a gap their mean; where training had gaps, an indicator of them as well |
| two categories | 0 for the first, 1 for the second, 0.5 for a value that is neither |
| more categories | an indicator of each; all are 0 for a value that is none of them |

A gap in a column of categories is a category if training had gaps, and a value that is none of them otherwise.
"""

import re
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ibaml.optional import require

Array: TypeAlias = npt.NDArray[Any]
Kind: TypeAlias = Literal["numbers", "text", "categories", "nothing"]

MOST_CATEGORIES = 50
"""A column with more different values is no column of categories."""

# As pandas.api.types.infer_dtype calls what a column holds, whatever its dtype.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("integer", "floating", "mixed-integer-float", "decimal", "boolean"), "numbers"),
    "string": "text",
    "categorical": "categories",
}
_DATES = ("datetime64", "datetime", "date", "time", "period")
_SPANS = ("timedelta64", "timedelta")
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}([T ].*)?|\d{1,2}([-/.])\d{1,2}\3(\d{4}|\d{2})( .*)?|\d{1,2}:\d{2}(:\d{2}.*)?"
)


class Column(NamedTuple):
    """How a column of a table becomes features.

    Attributes:
        name: Its name.
        categories: The values of training as text, sorted, None for a gap coming last; None for a column of numbers.
        mean: What stands for a gap in numbers; None: a gap is refused.
        has_gaps: Whether numbers had gaps in training, so that a feature says where they are.
    """

    name: str
    categories: tuple[str | None, ...] | None = None
    mean: float | None = None
    has_gaps: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its numbers are the only feature."""
        return self.categories is None and not self.has_gaps


def is_table(value: object) -> bool:
    """Tells whether a value is a table of pandas, or of a library whose tables can become one (polars, Arrow)."""
    pandas = sys.modules.get("pandas")
    is_frame = pandas is not None and isinstance(value, pandas.DataFrame)
    return is_frame or (hasattr(value, "to_pandas") and hasattr(value, "columns"))


def as_table(value: Any) -> Any:
    """Returns a table as a pandas DataFrame whose columns are named by strings and whose rows are numbered from 0.

    Args:
        value: A table, as ``is_table`` tells.

    Raises:
        ImportError: If it is one of another library and pandas is not installed.
        ValueError: If the names of columns have several levels.
    """
    frame = value if isinstance(value, _pandas().DataFrame) else value.to_pandas()
    if frame.columns.nlevels > 1:
        raise ValueError(
            f"the columns of the table have {frame.columns.nlevels} levels, such as {frame.columns[0]!r}; expected one "
            "name each: table.columns = ['_'.join(map(str, name)) for name in table.columns]."
        )
    # Either makes a new table, which takes longer than to read the columns of a few rows.
    if not all(isinstance(name, str) for name in frame.columns):
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    return frame if frame.index.equals(_pandas().RangeIndex(len(frame))) else frame.reset_index(drop=True)


def take(argument: str, table: Any, names: Sequence[str]) -> list[Any]:
    """Returns columns of a table by name, as pandas Series.

    Args:
        argument: How messages call the table.
        table: What ``as_table`` gives, or some rows of it.
        names: The columns; others are passed over.

    Raises:
        ValueError: If a column is missing, or there are several of a name.
    """
    present = list(table.columns)
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{argument} has no column {', '.join(missing)}; its columns are {', '.join(present)}.")
    if repeated := sorted({name for name in names if present.count(name) > 1}):
        raise ValueError(f"{argument} has several columns named {', '.join(repeated)}: rename all but one.")
    return [table[name] for name in names]


def fit_columns(
    names: Sequence[str], tables: Sequence[tuple[str, Any]], *, categories: Collection[str] = ()
) -> tuple[Column, ...]:
    """Finds how columns become features.

    Args:
        names: The columns, at least one.
        tables: What messages call a table, and the table as ``take`` wants it; those of all training tasks.
        categories: Columns whose values are categories, also if they are numbers.

    Raises:
        TypeError: If a column holds dates, numbers as text, or values of several kinds.
        ValueError: If a column is missing or has no values, a number is infinite, or there are too many categories.

    Examples:
        >>> import pandas
        >>> table = pandas.DataFrame({"age": [1.0, None, 3.0], "kind": ["cat", "dog", "cat"]})
        >>> columns = fit_columns(["age", "kind"], [("the table", table)])
        >>> encode_columns(columns, [("the table", table)])[0].tolist()
        [[1.0, 0.0, 0.0], [2.0, 1.0, 1.0], [3.0, 0.0, 0.0]]
    """
    if not names:
        raise ValueError(f"{tables[0][0]} has no columns; expected at least one feature.")
    taken = [(argument, take(argument, table, names)) for argument, table in tables]
    return tuple(
        _fit(name, [(argument, columns[place]) for argument, columns in taken], are_categories=name in categories)
        for place, name in enumerate(names)
    )


def encode_columns(columns: Sequence[Column], tables: Sequence[tuple[str, Any]]) -> list[Array]:
    """Returns the features of tables, float64, each ``[num_examples, num_features]``.

    A value of a kind that training had, but that training has not seen (a new category, a gap in a column without
    gaps), is no error: there is one RuntimeWarning for each column.

    Args:
        columns: How columns become features.
        tables: What messages call a table, and the table as ``take`` wants it.

    Raises:
        TypeError: If a column of numbers holds something else, or a column dates or values of several kinds.
        ValueError: If a column is missing or a number is infinite, or missing where no mean stands for it.
    """
    names = [column.name for column in columns]
    taken = [(argument, take(argument, table, names)) for argument, table in tables]
    features: list[Array] = []
    for place, column in enumerate(columns):
        pieces = [(argument, series[place]) for argument, series in taken]
        features += _encode_numbers(column, pieces) if column.categories is None else _encode_categories(column, pieces)
    ends = np.cumsum([len(table) for _, table in tables])
    return np.split(np.column_stack(features), ends[:-1])


def typed(columns: Sequence[Column], tables: Sequence[tuple[str, Any]]) -> Any:
    """Returns tables as one of numbers, with means in gaps, and of categories whose levels are those of training.

    Args:
        columns: The columns.
        tables: What messages call a table, and the table as ``take`` wants it.

    Raises:
        TypeError: If a column of numbers holds something else, or a column dates or values of several kinds.
        ValueError: If a column is missing, a number is infinite, or a category is missing or new.
    """
    pandas = _pandas()
    found: dict[str, Any] = {}
    for column in columns:
        pieces = [(argument, *take(argument, table, [column.name])) for argument, table in tables]
        if column.categories is None:
            # The indicator of gaps is not asked for.
            found[column.name] = _encode_numbers(column, pieces)[0]
            continue
        labels: list[Array] = []
        for argument, piece in pieces:
            codes, known = _factorize(argument, piece)
            if None in column.categories or bool((codes < 0).any()):
                raise ValueError(
                    f"column {column.name!r} has missing values, and a formula needs a category in every row: drop "
                    f"those rows, or name them, table[{column.name!r}].fillna('missing')."
                )
            if unseen := [label for label in known if label not in column.categories]:
                raise ValueError(
                    f"column {column.name!r} of {argument} holds {shown(unseen)}, which training has not seen; a "
                    f"formula knows the categories {shown(column.categories)}."
                )
            labels.append(np.array(known, dtype=object)[codes])
        found[column.name] = pandas.Categorical(np.concatenate(labels), categories=list(column.categories))
    return pandas.DataFrame(found, index=np.concatenate([table.index for _, table in tables]))


def _fit(name: str, pieces: Sequence[tuple[str, Any]], *, are_categories: bool = False) -> Column:
    kinds = {_kind(argument, piece): (argument, piece) for argument, piece in reversed(pieces)}
    kinds.pop("nothing", None)
    if not kinds:
        raise ValueError(f"column {name!r} has no values in the training tasks: leave it out.")
    if are_categories:
        return Column(name, categories=_find_categories(name, pieces, are_meant=True))
    if "numbers" not in kinds:
        return Column(name, categories=_find_categories(name, pieces, are_meant="categories" in kinds))
    if len(kinds) > 1:
        places = [f"{kind} ({_place(*where)})" for kind, where in sorted(kinds.items())]
        raise TypeError(
            f"column {name!r} holds {' and '.join(places)}: make all of one kind, with pandas.to_numeric or "
            ".astype(str)."
        )
    values = np.concatenate([_numbers(argument, piece) for argument, piece in pieces])
    present = values[~np.isnan(values)]
    # Divided first, so that the sum of large numbers is finite.
    return Column(name, mean=float(np.sum(present / len(present))), has_gaps=len(present) < len(values))


def _find_categories(name: str, pieces: Sequence[tuple[str, Any]], *, are_meant: bool) -> tuple[str | None, ...]:
    """Returns the sorted categories; values of a dtype of categories are meant as such, even if they look otherwise."""
    factored = [_factorize(argument, piece) for argument, piece in pieces]
    known = sorted({label for _, labels in factored for label in labels})
    if not are_meant:
        _refuse_disguised(name, known)
    num_rows = sum(int((codes >= 0).sum()) for codes, _ in factored)
    if len(known) > MOST_CATEGORIES or 1 < len(known) == num_rows:
        raise ValueError(
            f"column {name!r} has {len(known)} different values in {num_rows} rows of the training tasks, such as "
            f"{known[0]!r}; expected at most {MOST_CATEGORIES} categories, and some of them in several rows: leave the "
            "column out (features=[...]), or encode it as numbers or as fewer categories."
        )
    has_gaps = any(bool((codes < 0).any()) for codes, _ in factored)
    return (*known, None) if has_gaps else tuple(known)


def _refuse_disguised(name: str, labels: Sequence[str]) -> None:
    """Refuses text most of whose different values are numbers or dates: as categories they would lose their meaning."""
    pandas = _pandas()
    values = pandas.Series(labels)
    are_numbers = pandas.to_numeric(values.str.replace(",", "."), errors="coerce").notna()
    are_dates = values.map(lambda label: _DATE.fullmatch(label) is not None)
    for found, what, advice in (
        (are_numbers, "numbers", _advice_on_text(name) + ", or, if they are names, of categories, .astype('category')"),
        (are_dates, "dates", _advice_on_dates(name)),
    ):
        if 2 * found.sum() > len(values):
            raise TypeError(
                f"column {name!r} of the training tasks holds {what} as text, such as {values[found].iloc[0]!r} "
                f"({found.sum()} of {len(values)} different values): {advice}."
            )


def _encode_numbers(column: Column, pieces: Sequence[tuple[str, Any]]) -> list[Array]:
    values: list[Array] = []
    for argument, piece in pieces:
        found = _numbers(argument, piece)
        if column.mean is None and bool(np.isnan(found).any()):
            raise ValueError(
                f"{argument} has {np.isnan(found).sum()} missing values in column {column.name!r}, the first in "
                f"{_row(piece, np.isnan(found))}, but the model was trained without names of columns and knows no mean "
                "to fill in: drop or impute them."
            )
        values.append(found)
    whole = np.concatenate(values)
    gaps = np.isnan(whole)
    if column.mean is not None and bool(gaps.any()):
        whole = np.where(gaps, column.mean, whole)
        if not column.has_gaps:
            _warn(
                f"column {column.name!r} has missing values, and had none in training: its mean in training, "
                f"{column.mean:.6g}, stands for them."
            )
    return [whole, gaps.astype(np.float64)] if column.has_gaps else [whole]


def _encode_categories(column: Column, pieces: Sequence[tuple[str, Any]]) -> list[Array]:
    assert column.categories is not None
    places = {label: place for place, label in enumerate(column.categories)}
    found: list[Array] = []
    unseen: dict[str | None, None] = {}
    for argument, piece in pieces:
        codes, labels = _factorize(argument, piece)
        # The code of a gap is -1, which is the last.
        values = [*labels, None] if bool((codes < 0).any()) else labels
        unseen |= dict.fromkeys(label for label in values if label not in places)
        found.append(np.array([*(places.get(label, -1) for label in labels), places.get(None, -1)])[codes])
    if unseen:
        _warn(
            f"column {column.name!r} holds {shown([*unseen])}, which training has not seen: it counts as none of the "
            f"categories {shown(column.categories)}."
        )
    whole = np.concatenate(found)
    if len(places) == 2:
        return [np.where(whole < 0, 0.5, whole)]
    return [(whole == place).astype(np.float64) for place in places.values()]


def _kind(argument: str, column: Any) -> Kind:
    """Returns what a column holds, refusing what is no feature."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        # What follows gives the same, ten times as slowly: that counts where there are a thousand small tables.
        return "nothing" if bool(np.isnan(column.to_numpy()).all()) else "numbers"
    row = column.first_valid_index()
    if row is None:
        return "nothing"
    found = _pandas().api.types.infer_dtype(column, skipna=True)
    if found in _KINDS:
        return _KINDS[found]
    where = f"column {column.name!r} of {argument}"
    example = f"such as {str(column[row])!r} (row {row})"
    if found in _DATES:
        raise TypeError(f"{where} holds dates or times, {example}: {_advice_on_dates(column.name)}.")
    if found in _SPANS:
        raise TypeError(
            f"{where} holds spans of time, {example}: make numbers of them, table[{column.name!r}] = "
            f"table[{column.name!r}].dt.total_seconds(), or leave the column out."
        )
    are_text = column.dropna().map(lambda value: isinstance(value, str))
    if 0 < are_text.sum() < len(are_text):
        # The few among the many are what is to be corrected.
        odd = are_text[are_text == (are_text.mean() < 0.5)].index[0]
        example = f"such as {str(column[odd])!r} (row {odd}) among {'numbers' if are_text[odd] else 'text'}"
    raise TypeError(
        f"{where} has dtype {column.dtype} and holds values of the kind {found!r}, {example}; expected only numbers, "
        "only text or categories: make all of one kind, with pandas.to_numeric or .astype(str), or leave the column "
        "out."
    )


def _numbers(argument: str, column: Any) -> Array:
    """Returns numbers as float64, ``[num_examples]``, NaN for a gap."""
    kind = _kind(argument, column)
    if kind == "nothing":
        return np.full(len(column), np.nan)
    if kind != "numbers":
        row = column.first_valid_index()
        raise TypeError(
            f"column {column.name!r} of {argument} holds {kind}, such as {str(column[row])!r} (row {row}), but the "
            f"model was trained on numbers: {_advice_on_text(column.name)}."
        )
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    infinite = np.isinf(values)
    if bool(infinite.any()):
        raise ValueError(
            f"{argument} has {infinite.sum()} infinite values in column {column.name!r}, the first in "
            f"{_row(column, infinite)}: drop or impute them."
        )
    return values


def _factorize(argument: str, column: Any) -> tuple[Array, list[str]]:
    """Returns for each row the place of its value among the different ones, -1 for a gap, and these as text."""
    _kind(argument, column)
    codes, values = _pandas().factorize(column)
    return codes, [_label(value) for value in values]


def _label(value: Any) -> str:
    # Integers with gaps are floats in a CSV file.
    is_whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if is_whole else str(value)


def shown(labels: Sequence[Any]) -> str:
    """Returns some labels as a message shows them: the first eight, and how many there are."""
    named = ["a missing value" if label is None else repr(label) for label in labels]
    return ", ".join(named[:8]) + (f", ... ({len(named)} in all)" if len(named) > 8 else "")


def _place(argument: str, column: Any) -> str:
    return f"row {column.first_valid_index()} of {argument}"


def _row(column: Any, where: Array) -> str:
    return f"row {column.index[int(np.argmax(where))]}"


def _advice_on_dates(name: str) -> str:
    return (
        f"make numbers of them, for example table[{name!r}] = (pandas.to_datetime(table[{name!r}]) - "
        "pandas.Timestamp('2020-01-01')).dt.days, or take .dt.month or .dt.weekday, or leave the column out"
    )


def _advice_on_text(name: str) -> str:
    return f"make numbers of them, table[{name!r}] = pandas.to_numeric(table[{name!r}], errors='coerce')"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _pandas() -> Any:
    return require("pandas", "pandas", "tables")
