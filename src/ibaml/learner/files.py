"""Predictions from files: a table or images of support examples, another of query examples, and a file of answers."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibaml.algorithms.model import num_outputs_of
from ibaml.data.columns import Column, as_table
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.image_folder import load_class_folder, load_images
from ibaml.data.standardizer import IDENTITY
from ibaml.learner.groups import predict_groups
from ibaml.optional import require
from ibaml.posterior import FittedModel

_TABLES = (".csv", ".parquet")
_MOST_VALUES = 2**28


def predict_files(
    fitted: FittedModel,
    support: Path,
    query: Path,
    out: Path,
    *,
    level: float = 0.9,
    max_error: float | None = None,
) -> int:
    """Adapts to a support file, predicts for a query file and writes the answers.

    Tables (CSV or Parquet) have the columns of the training table; with its task column, each task of the query is
    answered from its own support, or from the prior if it has none. For a model that was fitted on tensors of vectors,
    the columns of the support table are the inputs, in order, and after them the targets or class indices. Images are a
    folder of class folders (support) and a folder of images (query).

    Args:
        fitted: The fitted model.
        support: Support examples.
        query: Query examples.
        out: CSV or Parquet file; made anew.
        level: Probability of the intervals.
        max_error: Classes: abstain such that no more than this share of the other answers is wrong; see
            ``TaskPosterior.predict``. None: answer all.

    Returns:
        The number of answers.

    Raises:
        FileNotFoundError: If a file does not exist.
        ImportError: If pandas is needed and absent.
        ValueError: If files do not fit the model or each other.
    """
    if out.suffix.lower() not in _TABLES:
        raise ValueError(f"--out is {out}; expected a name that ends in .csv or .parquet.")
    if not 0 < level < 1:
        raise ValueError(f"--level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
    if (form := _form_of_images(fitted)) is not None:
        answers = _predict_images(fitted, form, support, query, max_error)
    else:
        known = {} if fitted.preprocessing is None else text_columns(fitted.preprocessing)
        tables = read_table(support, known), read_table(query, known)
        try:
            fitted = fitted if fitted.preprocessing is not None else _with_columns(fitted, tables[0])
            assert fitted.preprocessing is not None
            answers = _predict_tables(fitted, fitted.preprocessing, *tables, level, max_error)
        except TypeError as error:
            # What a file holds is a value, even where in a program it would be an argument's type.
            raise ValueError(str(error)) from error
    write_table(out, answers)
    return len(next(iter(answers.values())))


def text_columns(preprocessing: Preprocessing) -> dict[str, tuple[str, ...]]:
    """Returns the columns that hold text of a known few kinds, labels and categories, each with the kinds."""
    known = {
        column.name: tuple(label for label in column.categories if label is not None)
        for column in preprocessing.columns or ()
        if column.categories is not None
    }
    labels = preprocessing.class_labels
    if labels is not None and labels.dtype.kind == "U":
        known |= {name: tuple(labels.tolist()) for name in preprocessing.target_columns or ()}
    return known


def read_table(path: Path, known: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Returns a CSV or Parquet file as a DataFrame, as ``ibaml.data.columns.as_table`` does.

    A CSV file does not say what its columns hold. One that holds nothing but known labels, or nothing, is read as these
    labels, though they may look like numbers ("1") or like a gap ("NA").

    Args:
        path: The file.
        known: Columns of text, each with the labels that it may hold.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If pandas (for Parquet pyarrow as well) is not installed.
        ValueError: If it is neither, or cannot be read.
    """
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"{path} is no table; expected a file that ends in .csv or .parquet.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    pandas = require("pandas", "pandas", "tables")
    try:
        if path.suffix.lower() != ".csv":
            _check_parquet(path)
            return as_table(pandas.read_parquet(path))
        table = as_table(pandas.read_csv(path))
        if wanted := [name for name in known or () if name in table.columns]:
            text = pandas.read_csv(path, usecols=wanted, dtype=str, keep_default_na=False)
            for name in wanted:
                if set(text[name]) <= {"", *(known or {})[name]}:
                    table[name] = text[name].mask(text[name] == "").astype(object)
        return table
    # What pandas and pyarrow make of files that are damaged, or nested more deeply than they can follow.
    except (ValueError, TypeError, LookupError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {str(error) or type(error).__name__}") from error


def _check_parquet(path: Path) -> None:
    """Refuses a file that unpacks to more than can be meant: a few bytes may stand for any number of equal values.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If it holds so many values.
    """
    require("pyarrow", "pyarrow", "tables")
    from pyarrow.parquet import read_metadata

    found = read_metadata(path)
    if (size := found.num_rows * found.num_columns) > _MOST_VALUES:
        raise ValueError(f"it has {size:,} values, and at most {_MOST_VALUES:,} are read")


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns of equal length as CSV or Parquet.

    Raises:
        OSError: If the file cannot be written.
        ImportError: If Parquet is asked for and pandas or pyarrow is not installed.
    """
    if path.suffix.lower() == ".parquet":
        require("pandas", "pandas", "tables").DataFrame(dict(columns)).to_parquet(path, index=False)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _with_columns(fitted: FittedModel, support: Any) -> FittedModel:
    """Returns a model of tensors as one of tables, whose columns are the inputs and then the targets, unscaled."""
    network = fitted.model.network
    shape = getattr(network, "input_shape", None)
    if shape is None or len(shape) != 1:
        raise ValueError(
            f"the model was fitted on tensors of shape {shape or 'unknown'} and does not know how to read files: "
            "fit it on a table or a folder of images."
        )
    num_outputs = num_outputs_of(network)
    likelihood = fitted.model.likelihood
    is_regression = likelihood.target_kind != "classes"
    num_targets = num_outputs // likelihood.num_outputs(1) if is_regression else 1
    columns = tuple(support.columns)
    if len(columns) != shape[0] + num_targets:
        raise ValueError(
            f"the support table has {len(columns)} columns, but the model needs {shape[0]} inputs and after them "
            f"{num_targets} target(s): it was fitted on tensors and knows no names."
        )
    preprocessing = Preprocessing(
        inputs=IDENTITY,
        input_shape=tuple(shape),
        num_outputs=num_targets if is_regression else num_outputs,
        targets=IDENTITY if is_regression else None,
        class_labels=None if is_regression else np.arange(num_outputs),
        is_vector=num_targets == 1,
        columns=tuple(Column(name) for name in columns[: shape[0]]),
        target_columns=columns[shape[0] :],
    )
    return dataclasses.replace(fitted, preprocessing=preprocessing)


def _predict_tables(
    fitted: FittedModel,
    preprocessing: Preprocessing,
    support: Any,
    query: Any,
    level: float,
    max_error: float | None,
) -> dict[str, list[Any]]:
    task = preprocessing.task_column
    by_task = task in support.columns and task in query.columns
    names = ("the support table", "the query table")
    prediction = predict_groups(
        fitted, support, query, task=task if by_task else None, max_error=max_error, names=names
    )
    answers = prediction.columns(level=level, names=preprocessing.target_columns or ())
    if clash := sorted(set(answers) & set(query.columns)):
        raise ValueError(f"the query table has columns named {', '.join(clash)}, as the answers do: rename them.")
    return {**{name: _as_list(query[name]) for name in query.columns}, **answers}


def _as_list(column: Any) -> list[Any]:
    # A gap is written as nothing, not as "nan".
    return [None if is_gap else value for value, is_gap in zip(column.tolist(), column.isna(), strict=True)]


class _ImageForm(NamedTuple):
    """How image files are read."""

    size: tuple[int, int]
    channels: int


def _form_of_images(fitted: FittedModel) -> _ImageForm | None:
    """Returns how the model wants image files; None for a model of tables."""
    if fitted.backbone is not None:
        backbone = fitted.backbone.backbone
        if backbone.size is None:
            raise ValueError(
                "the model's backbone has no image_size, and of files a backbone gets images alone: use adapt and "
                "predict in Python."
            )
        return _ImageForm(backbone.size, backbone.channels)
    preprocessing = fitted.preprocessing
    if preprocessing is None or preprocessing.image_size is None:
        return None
    return _ImageForm(preprocessing.image_size, preprocessing.input_shape[0])


def _predict_images(
    fitted: FittedModel, form: _ImageForm, support: Path, query: Path, max_error: float | None
) -> dict[str, Sequence[Any]]:
    size, channels = form
    images = load_class_folder(support, image_size=size, channels=channels)
    files = load_images(query, image_size=size, channels=channels)
    labels = np.repeat(np.array(images.class_names), images.class_sizes.numpy())
    posterior = fitted.adapt(images.images, labels, seed=0)
    prediction = posterior.predict(files.pixels, max_error=max_error)
    return {"file": list(files.names), **prediction.columns(level=0.9, names=())}
