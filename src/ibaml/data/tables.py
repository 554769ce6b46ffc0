"""Tasks as people have them: (X, y) pairs, a mapping of them, or one long table with a column that names the task.

Everything that comes in is checked here, once, and every message names the task, the column and what to do.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from ibaml.data.arrays import num_positions, to_array, to_int64
from ibaml.data.columns import Array, Column, as_table, encode_columns, is_table, take
from ibaml.optional import require
from ibaml.types import Batch, ColumnName, Episode

_ONE_ARRAY = (
    ", but a network sees one array: put them side by side in it and take them apart in forward, or give the network "
    "without its last layer as MetaLearner(backbone=module), which takes several, with fine_tune='*' to train it."
)

_LARGEST_EXACT = {2: 2**11, 4: 2**24, 8: 2**53}
"""Up to where every whole number is one of a floating-point dtype of so many bytes."""


class TableTask(NamedTuple):
    """The examples of one task, checked but not yet scaled.

    Attributes:
        name: The caller's name of the task, or its position.
        x: Finite numbers, ``[num_examples, *input_shape]``; or rows of a table, as ``ibaml.data.columns`` takes it.
        y: Labels or targets, ``[num_examples]`` or ``[num_examples, num_outputs]``.
    """

    name: str
    x: Any
    y: Array


class TaskTable(NamedTuple):
    """Tasks with the names of their columns.

    Attributes:
        tasks: At least one, all with inputs of one shape, or all with tables.
        feature_names: Columns of the inputs in their order, if they came with names.
        task_column: Column that names the task, in a long table.
        target_columns: Columns of the targets, in a long table.
    """

    tasks: tuple[TableTask, ...]
    feature_names: tuple[str, ...] | None = None
    task_column: str | None = None
    target_columns: tuple[str, ...] | None = None

    @property
    def inputs(self) -> list[tuple[str, Any]]:
        """What messages call inputs, and the inputs of all tasks: of each task, or of a long table in one piece."""
        if self.task_column is None:
            return [(f"X of task {task.name!r}", task.x) for task in self.tasks]
        # Many pieces would take pandas a hundred times as long. Rows keep their numbers.
        return [("the table", require("pandas", "pandas", "tables").concat([task.x for task in self.tasks]))]


def read_tasks(
    tasks: Any,
    *,
    task: ColumnName | None = None,
    target: ColumnName | Sequence[ColumnName] | None = None,
    features: Sequence[ColumnName] | None = None,
) -> TaskTable:
    """Reads tasks in any of the accepted forms.

    Args:
        tasks: A sequence of ``(X, y)`` pairs, a mapping from names to such pairs, or a DataFrame (a table of pandas,
            polars or Arrow) with one row per example. ``X`` is an array, tensor or DataFrame; tasks may differ in their
            numbers of examples.
        task: DataFrame only: column that says which task a row belongs to.
        target: DataFrame only: column (or columns) to predict.
        features: DataFrame only: columns of the inputs. None: all that are neither ``task`` nor ``target``.

    Raises:
        TypeError: If the tasks are of no accepted form.
        ValueError: If there are none, a column is missing, inputs and targets differ in number, numbers of features
            differ from task to task, or a value of an array is missing or infinite. What columns hold is checked where
            they become features (``ibaml.data.columns``).

    Examples:
        >>> table = read_tasks([([[1.0], [2.0]], [0, 1]), ([[3.0]], [1])])
        >>> [task.x.shape for task in table.tasks]
        [(2, 1), (1, 1)]
    """
    if is_table(tasks):
        return _read_long_table(as_table(tasks), task=task, target=target, features=features)
    if task is not None or target is not None or features is not None:
        raise TypeError(
            f"task, target and features name columns of a pandas DataFrame, but tasks is a {type(tasks).__name__}: "
            "leave them out."
        )
    if isinstance(tasks, Mapping):
        pairs = [(str(name), pair) for name, pair in tasks.items()]
    elif isinstance(tasks, Sequence) and not isinstance(tasks, str | bytes):
        pairs = [(str(index), pair) for index, pair in enumerate(tasks)]
    else:
        raise TypeError(
            "tasks must be a sequence of (X, y) pairs, a mapping from names to such pairs, a pandas DataFrame, a "
            f"folder of class folders, a sequence of Episodes or a task sampler, but is a {type(tasks).__name__}."
        )
    if not pairs:
        raise ValueError("tasks is empty; expected at least one (X, y) pair.")
    read: list[TableTask] = []
    for name, pair in pairs:
        if isinstance(pair, Episode) or not isinstance(pair, Batch | tuple | list) or len(pair) != 2:
            came = f"{type(pair).__name__}" + (f" of {len(pair)}" if isinstance(pair, tuple | list) else "")
            raise TypeError(f"task {name!r} must be a pair (X, y), but is a {came}.")
        x, y = pair
        if hasattr(y, "__len__") and (number := num_positions(x, len(y))):
            raise TypeError(f"X of task {name!r} is a tuple of {number} inputs side by side{_ONE_ARRAY}")
        inputs = as_table(x) if is_table(x) else read_inputs(f"X of task {name!r}", x)
        read.append(_checked(name, inputs, to_array(y, f"y of task {name!r}")))
    _require_one_kind(read)
    return TaskTable(tuple(read), tuple(read[0].x.columns) if is_table(read[0].x) else None)


def read_inputs(argument: str, x: Any) -> Array:
    """Returns inputs as a numeric array without missing values.

    Args:
        argument: How messages call it.
        x: Array, tensor, nested lists, or a DataFrame of numbers, whose columns are taken in their order.

    Raises:
        ValueError: If there is no axis of features, or a value is not finite.
        TypeError: If the values are no numbers, or several arrays.
    """
    if is_table(x):
        table = as_table(x)
        return encode_columns([Column(name) for name in table.columns], [(argument, table)])[0]
    if isinstance(x, Mapping):
        names = ", ".join(map(str, cast("Mapping[Any, Any]", x)))
        raise TypeError(f"{argument} is a mapping of inputs ({names}){_ONE_ARRAY}")
    values = to_array(x, argument)
    if values.dtype == object:
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{argument} holds values that are no numbers ({error}): encode text and categories as numbers first, "
                "and give every row the same length."
            ) from error
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"{argument} has dtype {values.dtype}, but expected real numbers: encode text, dates and categories as "
            "numbers first."
        )
    if values.ndim < 2:
        raise ValueError(
            f"{argument} has shape {values.shape}, but expected [num_examples, num_features]: for a single feature use "
            "x.reshape(-1, 1), for a single example x.reshape(1, -1)."
        )
    if 0 in values.shape[1:]:
        raise ValueError(f"{argument} has no features (shape {values.shape}); expected at least one.")
    require_finite(argument, values)
    return values


def require_finite(argument: str, values: Array, *, advice: str = "drop or impute them") -> None:
    """Refuses missing and infinite values.

    Args:
        argument: How messages call the values.
        values: Values of any kind.
        advice: What to do.

    Raises:
        ValueError: Naming how many there are, and the row and column of the first.
    """
    if values.dtype.kind != "f" or bool(np.isfinite(values).all()):
        return
    bad = np.argwhere(~np.isfinite(values))
    first = tuple(int(index) for index in bad[0])
    where = f"row {first[0]}"
    if len(first) > 1:
        where += f", column {', '.join(map(str, first[1:]))}"
    raise ValueError(f"{argument} has {len(bad)} missing (NaN) or infinite values, the first in {where}: {advice}.")


def read_labels(argument: str, y: Array) -> Array:
    """Returns class labels as a vector of strings, integers, floats or booleans.

    Raises:
        TypeError: If the labels mix kinds, or are none of these.
        ValueError: If there is more than one per example, one is missing, or one cannot be told from others: text that
            ends in a zero character, or a number that its dtype does not hold exactly.
    """
    if y.ndim != 1:
        raise ValueError(f"{argument} has shape {y.shape}, but expected one class label per example, [num_examples].")
    if y.dtype == object:
        missing = [index for index, value in enumerate(y.tolist()) if value is None or value != value]
        if missing:
            raise ValueError(
                f"{argument} has {len(missing)} missing labels, the first in row {missing[0]}: drop those rows."
            )
        kinds = {type(value) for value in y.tolist()}
        if kinds == {str}:
            if cut := [value for value in y.tolist() if value.endswith("\0")]:
                raise ValueError(
                    f"{argument} has the label {cut[0]!r}, which ends in a zero character that numpy drops: give "
                    "labels without it."
                )
            return y.astype(np.str_)
        if len(kinds) > 1 or not kinds <= {bool, int, float}:
            raise TypeError(
                f"{argument} has labels of the types {', '.join(sorted(kind.__name__ for kind in kinds))}; expected "
                "only strings, only integers or only booleans: convert them to one type, for example to strings."
            )
        y = np.array(y.tolist())
    if y.dtype.kind not in "biufU":
        raise TypeError(f"{argument} has labels of dtype {y.dtype}; expected strings, integers or booleans.")
    require_finite(argument, y)
    if y.dtype.kind == "f" and not bool((y == np.round(y)).all()):
        raise ValueError(
            f"{argument} has labels that are no whole numbers, such as {y[y != np.round(y)][0]}: for real targets use "
            "likelihood='gaussian', or turn the labels into strings."
        )
    if y.dtype.kind == "f" and bool((np.abs(y) > _LARGEST_EXACT[y.dtype.itemsize]).any()):
        raise ValueError(
            f"{argument} has the label {y[np.abs(y).argmax()]:g}, and whole numbers that large are not all different "
            f"in {y.dtype}: give labels as integers or text."
        )
    # Two kinds of integers together would become floating-point numbers.
    return to_int64(argument, y) if y.dtype.kind in "iu" else y


def read_targets(argument: str, y: Array, rows: Sequence[Any] | None = None) -> Array:
    """Returns regression targets as float64 of shape ``[num_examples, num_outputs]``.

    Of several targets some may be missing (NaN), which are those that were not measured.

    Args:
        argument: How messages call them.
        y: The targets.
        rows: How messages call the examples. None: 0, 1, ...

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If the shape is wrong, a value is infinite, or an example has no target.
    """
    if y.dtype == object:
        try:
            y = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            place = next(place for place, value in np.ndenumerate(y) if not _is_number(value))
            raise TypeError(
                f"{argument} holds values that are no numbers, the first {str(y[place])!r} in row "
                f"{place[0] if rows is None else rows[place[0]]}: correct or drop it, or for class labels use "
                "likelihood='categorical'."
            ) from error
    if y.dtype.kind not in "biuf":
        raise TypeError(
            f"{argument} has dtype {y.dtype}, but expected real numbers: for class labels use likelihood='categorical'."
        )
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] == 0):
        raise ValueError(f"{argument} has shape {y.shape}, but expected [num_examples] or [num_examples, num_outputs].")
    values = y.reshape(len(y), -1).astype(np.float64)
    if values.shape[1] == 1:
        require_finite(argument, y)
        return values
    missing = np.isnan(values)
    if bool((empty := missing.all(1)).any()):
        first = int(empty.argmax())
        raise ValueError(
            f"{argument} has {empty.sum()} rows of which no target was measured, the first is row "
            f"{first if rows is None else rows[first]}: drop them."
        )
    require_finite(argument, np.where(missing, 0.0, values), advice="correct them; what was not measured is NaN")
    return values


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return value is None
    return True


def _read_long_table(
    table: Any,
    *,
    task: ColumnName | None,
    target: ColumnName | Sequence[ColumnName] | None,
    features: Sequence[ColumnName] | None,
) -> TaskTable:
    columns: list[str] = list(table.columns)
    if task is None or target is None:
        raise ValueError(
            f"a DataFrame needs task=..., the column that names the task of a row, and target=..., the column to "
            f"predict; its columns are {', '.join(columns)}."
        )
    task, (targets, is_vector) = str(task), target_names(target)
    chosen = [name for name in columns if name not in {task, *targets}] if features is None else [*map(str, features)]
    if not chosen:
        raise ValueError(f"there is no feature column beside {task} and {', '.join(targets)}; expected at least one.")
    if overlap := sorted({task, *targets} & set(chosen)):
        raise ValueError(f"features names {', '.join(overlap)}, which is the task or the target: leave it out.")
    if len(table) == 0:
        raise ValueError("the table has no rows.")
    of_task, *of_targets = take("the table", table, [task, *targets])
    names = complete("the table", of_task)
    # Of several targets some may not be measured.
    values = [complete("the table", column) if len(targets) == 1 else to_array(column) for column in of_targets]
    take("the table", table, chosen)
    x, y = table[chosen], values[0] if is_vector else np.stack(values, 1)
    # In the order of first appearance, whatever the type of the names.
    rows: dict[Any, list[int]] = {}
    for index, name in enumerate(names.tolist()):
        rows.setdefault(name, []).append(index)
    tasks = tuple(TableTask(str(name), x.iloc[chosen_rows], y[chosen_rows]) for name, chosen_rows in rows.items())
    return TaskTable(tasks, tuple(chosen), task, targets)


def target_names(target: ColumnName | Iterable[ColumnName]) -> tuple[tuple[str, ...], bool]:
    """Returns the names of target columns, and whether it is one that was not given as a list.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(target, str) or not isinstance(target, Iterable):
        return (str(target),), True
    targets = tuple(map(str, target))
    if not targets:
        raise ValueError("target is empty; expected the name of a column, or several.")
    return targets, False


def complete(argument: str, column: Any) -> Array:
    """Returns a column as an array.

    Args:
        argument: How messages call the table.
        column: A column without a gap, such as tasks or targets.

    Raises:
        ValueError: If a value is missing.
    """
    missing = column.isna().to_numpy()
    if bool(missing.any()):
        raise ValueError(
            f"column {column.name!r} of {argument} is missing in {missing.sum()} rows, the first is row "
            f"{missing.argmax()}: every row needs a task and a target; drop those that have none."
        )
    return to_array(column)


def _checked(name: str, x: Array, y: Array) -> TableTask:
    if y.ndim == 0 or len(x) != len(y):
        came = "a single value" if y.ndim == 0 else f"{len(y)} targets"
        raise ValueError(f"task {name!r} has {len(x)} examples in X, but {came} in y; expected as many.")
    if len(x) == 0:
        raise ValueError(f"task {name!r} has no examples; expected at least one: drop the task.")
    return TableTask(name, x, y)


def _require_one_kind(tasks: Sequence[TableTask]) -> None:
    first = tasks[0]
    for task in tasks:
        if is_table(task.x) != is_table(first.x):
            named, other = (task, first) if is_table(task.x) else (first, task)
            raise TypeError(
                f"X of task {named.name!r} has columns with names, that of task {other.name!r} has not: give all tasks "
                "as DataFrames or all as arrays."
            )
        if not is_table(task.x) and task.x.shape[1:] != first.x.shape[1:]:
            raise ValueError(
                f"task {task.name!r} has inputs of shape {task.x.shape[1:]}, task {first.name!r} of "
                f"{first.x.shape[1:]}: all tasks need the same features."
            )
