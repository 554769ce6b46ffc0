"""What a learner has to know about its data to turn arrays into tensors, and predictions back into the data's terms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ibaml.data.arrays import to_array, warn_if_far
from ibaml.data.columns import Column, as_table, encode_columns, fit_columns, is_table, shown
from ibaml.data.formulas import Formula, encode_formula, fit_formula
from ibaml.data.images import WHITE
from ibaml.data.standardizer import IDENTITY, Standardizer, fit_standardizer, fit_target_standardizer
from ibaml.data.tables import Array, TaskTable, read_inputs, read_labels, read_targets
from ibaml.likelihoods import TargetKind
from ibaml.types import Batch, ClassScope, Tensor

CLASS_SCOPES: tuple[ClassScope, ...] = ("shared", "per_task")
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preprocessing:
    """Scales, class labels and column names, fitted on meta-training tasks and saved with the model.

    Attributes:
        inputs: Scale of the features.
        input_shape: Shape of one example.
        targets: Scale of the targets, which for counts changes nothing; None for classes.
        class_labels: Labels in the order of the network's outputs; None for regression and for classes of each task.
        num_outputs: Outputs of the network.
        is_vector: Whether regression targets came as ``[num_examples]``, and so predictions do.
        columns: How the columns of the inputs become features, if they came with names.
        formula: What becomes of them instead, if a formula says so.
        task_column: Column that named the task.
        target_columns: Columns of the targets.
        image_size: Height and width to which images are resized; None for tables.
    """

    inputs: Standardizer
    input_shape: tuple[int, ...]
    num_outputs: int
    targets: Standardizer | None = None
    class_labels: Array | None = None
    is_vector: bool = True
    columns: tuple[Column, ...] | None = None
    formula: Formula | None = None
    task_column: str | None = None
    target_columns: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers."""
        return self.targets is not None

    @property
    def feature_names(self) -> tuple[str, ...] | None:
        """Columns of the inputs in their order, if they came with names."""
        return None if self.columns is None else tuple(column.name for column in self.columns)

    def encode_inputs(self, argument: str, x: Any, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns scaled inputs, ``[num_examples, *input_shape]``.

        Columns of a DataFrame are found by name, and what training has not seen in them is a RuntimeWarning; see
        ``ibaml.data.columns``. Without names, inputs are the features of training in their order.

        Raises:
            TypeError: If the values are no numbers, or a column holds something else than in training.
            ValueError: If a column is missing, the shape differs from that in training, or a value is not finite or too
                far from those of training to be represented.
        """
        (encoded,) = self.encode_each([(argument, as_table(x) if is_table(x) else x)], dtype=dtype)
        return encoded

    def encode_each(self, inputs: Sequence[tuple[str, Any]], *, dtype: torch.dtype) -> list[Tensor]:
        """Returns the scaled inputs of several tasks, with one warning where ``encode_inputs`` had one for each.

        Args:
            inputs: How messages call inputs, and the inputs: those of all tasks as arrays, or all as ``as_table`` does.
            dtype: Of the tensors.

        Raises:
            TypeError, ValueError: As of ``encode_inputs``.
        """
        if self.columns is not None and all(is_table(x) for _, x in inputs):
            values = _encode(self.columns, self.formula, inputs)
        else:
            values = [self._read_unnamed(argument, x) for argument, x in inputs]
        return [self._scale(argument, x, read).to(dtype) for (argument, x), read in zip(inputs, values, strict=True)]

    def _read_unnamed(self, argument: str, x: Any) -> Array:
        if other := [column.name for column in self.columns or () if not column.is_plain]:
            raise TypeError(
                f"{argument} has no names of columns ({type(x).__name__}), but the model was trained on columns of "
                f"categories or with missing values ({', '.join(other)}): pass a DataFrame."
            )
        if self.formula is not None:
            raise TypeError(
                f"{argument} has no names of columns ({type(x).__name__}), but the model was trained on the formula "
                f"{self.formula.text!r}: pass a DataFrame."
            )
        values = read_inputs(argument, x)
        if values.shape[1:] != self.input_shape:
            advice = "pass the same features in the same order"
            if self.image_size is not None:
                advice = "pass images of that size, channels first"
                if values.shape[1:] == (*self.input_shape[1:], self.input_shape[0]):
                    advice = "channels come first: move the last axis to the second place (numpy.moveaxis(x, -1, 1))"
            raise ValueError(
                f"{argument} has shape {values.shape}, but the model was trained on inputs of shape "
                f"[num_examples, {', '.join(map(str, self.input_shape))}]: {advice}."
            )
        if self.image_size is not None and values.dtype.kind == "f" and len(values) and 0 < values.max() <= 1:
            raise ValueError(
                f"{argument} holds floating-point numbers up to {values.max():.3g}, but the model takes images of "
                "0..255: pass the pixels as they are in the file, or multiply by 255."
            )
        return values

    def _scale(self, argument: str, x: Any, values: Array) -> Tensor:
        scaled = self.inputs.transform(values)
        if len(scaled) and not bool((np.abs(scaled) < _LARGEST).all()):
            row = int(np.argwhere(~(np.abs(scaled) < _LARGEST))[0][0])
            row = x.index[row] if is_table(x) else row
            raise ValueError(
                f"{argument} has values beyond the range of float32 after scaling, the first in row {row}: they are on "
                "another scale than in training; check their units."
            )
        if not self.inputs.is_identity:
            warn_if_far(argument, scaled, x.index if is_table(x) else None)
        return torch.from_numpy(scaled)

    def encode_targets(
        self, argument: str, y: Any, labels: Array | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Returns class indices, or scaled targets of shape ``[num_examples, num_outputs]``.

        Args:
            argument: How messages call it.
            y: Labels or targets.
            labels: Class labels in the order of the outputs, where each task has its own.
            dtype: Of scaled targets.

        Raises:
            TypeError: If the values are of the wrong kind.
            ValueError: If a label is unknown, the shape is wrong or a value is not finite.
        """
        if self.targets is not None:
            values = read_targets(argument, to_array(y, argument))
            if values.shape[1] != self.num_outputs:
                raise ValueError(
                    f"{argument} has {values.shape[1]} columns, but the model was trained on {self.num_outputs} "
                    "targets: pass the same ones."
                )
            scaled = self.targets.transform(values)
            if self.targets is not IDENTITY:
                warn_if_far(argument, scaled, y.index if hasattr(y, "iloc") else None)
            return torch.from_numpy(scaled).to(dtype)
        labels = self.class_labels if labels is None else labels
        assert labels is not None
        return _to_indices(argument, read_labels(argument, to_array(y, argument)), labels)

    def labels_of_task(self, argument: str, y: Any, *, any_number: bool = False) -> Array:
        """Returns the class labels of one task in the order of the outputs.

        Args:
            argument: How messages call the labels.
            y: Labels of its support set.
            any_number: Whether there may be more or fewer classes than the network has outputs.

        Raises:
            ValueError: If each task has classes of its own and these are not as many as the network has outputs.
        """
        if self.class_labels is not None:
            return self.class_labels
        found = np.unique(read_labels(argument, to_array(y, argument)))
        if len(found) != self.num_outputs and not any_number:
            raise ValueError(
                f"{argument} has {len(found)} classes ({shown(found.tolist())}), but the model tells "
                f"{self.num_outputs} apart: give support examples of exactly {self.num_outputs} classes."
            )
        return found

    def settings(self) -> dict[str, Any]:
        """Returns all but the scales as JSON values."""
        return {
            "input_shape": list(self.input_shape),
            "num_outputs": self.num_outputs,
            "is_regression": self.is_regression,
            "class_labels": None if self.class_labels is None else self.class_labels.tolist(),
            "is_vector": self.is_vector,
            "feature_names": None if self.feature_names is None else list(self.feature_names),
            "columns": {column.name: _as_json(column) for column in self.columns or ()},
            "formula": None if self.formula is None else self.formula.settings(),
            "task_column": self.task_column,
            "target_columns": None if self.target_columns is None else list(self.target_columns),
            "image_size": None if self.image_size is None else list(self.image_size),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns the scales by name."""
        named = {f"inputs/{name}": value for name, value in self.inputs._asdict().items()}
        if self.targets is not None:
            named |= {f"targets/{name}": value for name, value in self.targets._asdict().items()}
        return named

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Preprocessing":
        """Builds again what ``settings`` and ``tensors`` described."""

        def scale(group: str) -> Standardizer:
            return Standardizer(tensors[f"{group}/mean"], tensors[f"{group}/inverse_scale"])

        def optional_tuple(name: str) -> Any:
            return None if settings[name] is None else tuple(settings[name])

        labels, names, columns = settings["class_labels"], settings["feature_names"], settings.get("columns", {})
        return cls(
            inputs=scale("inputs"),
            input_shape=tuple(settings["input_shape"]),
            num_outputs=settings["num_outputs"],
            targets=scale("targets") if settings["is_regression"] else None,
            class_labels=None if labels is None else np.array(labels),
            is_vector=settings["is_vector"],
            # A model of an earlier version has names alone, of columns of numbers without gaps.
            columns=None if names is None else tuple(_as_column(name, columns.get(name, {})) for name in names),
            formula=None if settings.get("formula") is None else Formula.restore(settings["formula"]),
            task_column=settings["task_column"],
            target_columns=optional_tuple("target_columns"),
            image_size=optional_tuple("image_size"),
        )


def image_preprocessing(image_shape: tuple[int, int, int], num_ways: int, *, inverted: bool = False) -> Preprocessing:
    """Returns the preprocessing of images of 0..255, which are scaled to [0, 1].

    Args:
        image_shape: Channels, height and width; files are resized to it.
        num_ways: Classes of a task, each task with its own.
        inverted: Whether white is 0 and black is 1.
    """
    black, scale = (WHITE, -1 / WHITE) if inverted else (0, 1 / WHITE)
    per_channel = torch.ones(image_shape[0], 1, 1, dtype=torch.float64)
    return Preprocessing(
        inputs=Standardizer(black * per_channel, scale * per_channel),
        input_shape=image_shape,
        num_outputs=num_ways,
        image_size=image_shape[1:],
    )


def fit_preprocessing(
    table: TaskTable,
    *,
    target_kind: TargetKind,
    classes: ClassScope,
    num_ways: int | None,
    formula: Formula | None = None,
) -> Preprocessing:
    """Fits scales, encodings of columns and labels on meta-training tasks.

    Args:
        table: The tasks.
        target_kind: What the targets are; real ones are scaled, counts are not.
        classes: Whether labels mean the same in all tasks.
        num_ways: Classes of a task, if each has its own; None: the smallest number that a task has.
        formula: What becomes of the columns of a table. None: what ``ibaml.data.columns`` says.

    Raises:
        TypeError: If columns, labels or targets are of the wrong kind, or labels differ in kind between tasks.
        ValueError: If all features are constant, there is a single class, targets differ in number, or a column cannot
            be encoded.
    """
    columns, features = None, [task.x for task in table.tasks]
    if table.feature_names is not None:
        categories = () if formula is None else formula.categories
        columns = fit_columns(table.feature_names, table.inputs, categories=categories)
        formula = None if formula is None else fit_formula(formula, columns, table.inputs)
        features = _encode(columns, formula, table.inputs)
    inputs = fit_standardizer(features)
    if inputs.is_constant:
        raise ValueError("every feature is constant over all training tasks: there is nothing to predict from.")
    common: dict[str, Any] = {
        "inputs": inputs,
        "input_shape": tuple(features[0].shape[1:]),
        "columns": columns,
        "formula": formula,
        "task_column": table.task_column,
        "target_columns": table.target_columns,
    }
    if target_kind != "classes":
        values = [
            read_targets(f"y of task {task.name!r}", task.y, task.x.index if is_table(task.x) else None)
            for task in table.tasks
        ]
        for task, targets in zip(table.tasks, values, strict=True):
            if targets.shape[1] != values[0].shape[1]:
                raise ValueError(
                    f"task {task.name!r} has {targets.shape[1]} targets, task {table.tasks[0].name!r} has "
                    f"{values[0].shape[1]}: all tasks need the same."
                )
        return Preprocessing(
            **common,
            targets=fit_target_standardizer(values, table.target_columns) if target_kind == "real" else IDENTITY,
            num_outputs=values[0].shape[1],
            is_vector=all(task.y.ndim == 1 for task in table.tasks),
        )
    labels = [read_labels(f"y of task {task.name!r}", task.y) for task in table.tasks]
    for task, found in zip(table.tasks, labels, strict=True):
        if (found.dtype.kind == "U") != (labels[0].dtype.kind == "U"):
            raise TypeError(
                f"task {task.name!r} has labels of dtype {found.dtype}, task {table.tasks[0].name!r} of "
                f"{labels[0].dtype}: convert all to one type."
            )
    if classes == "shared":
        known = np.unique(np.concatenate(labels))
        if known.dtype.kind == "f" and bool((np.abs(known) > 2**53).any()):
            raise TypeError(
                f"some tasks have labels that are integers, as large as {known[np.abs(known).argmax()]:.17g}, others "
                "floating-point numbers, which cannot tell them apart: convert all to integers or text."
            )
        if len(known) < 2:
            raise ValueError(
                f"all training tasks have the single class {known[0].item()!r}: there is nothing to tell apart. For "
                "real targets use likelihood='gaussian'."
            )
        return Preprocessing(**common, class_labels=known, num_outputs=len(known))
    numbers = [len(np.unique(found)) for found in labels]
    ways = min(numbers) if num_ways is None else num_ways
    if ways < 2:
        raise ValueError(
            f"task {table.tasks[int(np.argmin(numbers))].name!r} has a single class, and classes='per_task' needs at "
            "least 2 in every task: drop it."
        )
    return Preprocessing(**common, num_outputs=ways)


def _encode(columns: Sequence[Column], formula: Formula | None, tables: Sequence[tuple[str, Any]]) -> list[Array]:
    return encode_columns(columns, tables) if formula is None else encode_formula(formula, columns, tables)


def encode_tasks(preprocessing: Preprocessing, table: TaskTable, *, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Returns the tasks as tensors; classes of each task's own are numbered in sorted order.

    Raises:
        ValueError: If a task does not fit what training had.
    """
    batches: list[Batch] = []
    sizes = [len(task.y) for task in table.tasks]
    for task, x in zip(
        table.tasks, torch.cat(preprocessing.encode_each(table.inputs, dtype=dtype)).split(sizes), strict=True
    ):
        argument = f"y of task {task.name!r}"
        labels = None
        if not preprocessing.is_regression and preprocessing.class_labels is None:
            labels = np.unique(read_labels(argument, task.y))
        batches.append(Batch(x, preprocessing.encode_targets(argument, task.y, labels, dtype=dtype)))
    return batches


def _as_json(column: Column) -> dict[str, Any]:
    """Returns all but the name."""
    return {
        "categories": None if column.categories is None else list(column.categories),
        "mean": column.mean,
        "has_gaps": column.has_gaps,
    }


def _as_column(name: str, settings: Mapping[str, Any]) -> Column:
    """Returns what ``_as_json`` described; numbers without a mean if nothing."""
    categories = settings.get("categories")
    plain = Column(name, mean=settings.get("mean"), has_gaps=settings.get("has_gaps", False))
    return plain if categories is None else plain._replace(categories=tuple(categories))


def _to_indices(argument: str, y: Array, labels: Array) -> Tensor:
    if (y.dtype.kind == "U") != (labels.dtype.kind == "U"):
        raise TypeError(
            f"{argument} has labels of dtype {y.dtype}, but the model's classes are {shown(labels.tolist())}."
        )
    unknown = ~np.isin(y, labels)
    if bool(unknown.any()):
        raise ValueError(
            f"{argument} has the label {y[unknown][0].item()!r} (row {int(np.argmax(unknown))}), but the classes are "
            f"{shown(labels.tolist())}: for classes that differ from task to task use classes='per_task'."
        )
    return torch.from_numpy(np.searchsorted(labels, y).astype(np.int64))
