"""Predictions for many groups of a table in one call, also for groups of which nothing is known.

Each group is a task: it is adapted to its own known rows as by ``MetaLearner.adapt``, and its asked rows are predicted
as by ``TaskPosterior.predict``. What does not depend on the group is done once: the table becomes tensors and, for
heads, features, from which groups of equal size are solved at once.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ibaml.algorithms import MetaParameters
from ibaml.data.columns import as_table, is_table, take
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.tables import Array, complete, target_names
from ibaml.likelihoods import ClassPrediction, MixturePrediction, Prediction
from ibaml.posterior import FittedModel
from ibaml.seeds import noise_generator
from ibaml.types import Batch, ColumnName, Tensor

_MOST_AT_ONCE = 1_024
_MOST_PRODUCTS = 2**20
"""Groups that are solved at once, and products of their rows: solutions hold one or a few for each pair of rows."""

_Outputs = dict[str, Tensor]


class _Group(NamedTuple):
    """Positions of a group's rows among the known and among the asked ones."""

    known: Tensor
    asked: Tensor


def predict_new(
    fitted: FittedModel,
    known: Any,
    asked: Any,
    *,
    task: ColumnName | None = None,
    target: ColumnName | Sequence[ColumnName] | None = None,
    max_error: float | None = None,
) -> Prediction:
    """Predicts rows of many groups; see ``MetaLearner.predict_new``."""
    for argument, table in (("known", known), ("asked", asked)):
        if not is_table(table):
            raise TypeError(
                f"{argument} must be a table, such as a pandas DataFrame, with a column that names the group of a row, "
                f"but is a {type(table).__name__}: for arrays call adapt and predict for each group."
            )
    if task is None and fitted.preprocessing is not None:
        task = fitted.preprocessing.task_column
    if task is None:
        raise ValueError("task is None, and fit was told of no column with tasks: name the one of both tables.")
    columns = None if target is None else target_names(target)[0]
    prediction = predict_groups(
        fitted, as_table(known), as_table(asked), task=str(task), targets=columns, max_error=max_error
    )
    if isinstance(prediction, ClassPrediction | MixturePrediction):
        # Only tables of pandas label their rows.
        prediction = dataclasses.replace(prediction, row_index=getattr(asked, "index", None))
    return prediction


def predict_groups(
    fitted: FittedModel,
    known: Any,
    asked: Any,
    *,
    task: str | None,
    targets: Sequence[str] | None = None,
    max_error: float | None = None,
    names: tuple[str, str] = ("known", "asked"),
) -> Prediction:
    """Predicts rows of many groups, each from the known rows of its own.

    Args:
        fitted: A model that was fitted on tables.
        known: Table with the features, the targets and the column of the group, as ``as_table`` gives it.
        asked: Table with the features and the column of the group. Groups without known rows get the prior's
            prediction.
        task: Column of both that says to which group a row belongs. None: all rows are of one group.
        targets: Columns of ``known`` with the targets. None: those of training.
        max_error: As in ``TaskPosterior.predict``.
        names: How messages call the two tables.

    Returns:
        The prediction of the asked rows, in their order. Where groups have classes of their own, its classes are those
        of all groups, and a class that a group does not have has the probability zero there.

    Raises:
        TypeError: If values are of the wrong kind, or groups are text in one table and numbers in the other.
        ValueError: If a column is missing, or a row does not fit the model, or a group has no known rows where the
            model has no prior.
    """
    preprocessing = fitted.preprocessing
    targets = preprocessing.target_columns if targets is None and preprocessing is not None else targets
    if preprocessing is None or preprocessing.feature_names is None:
        raise ValueError("the model was fitted on arrays, so the target has no column name: fit it on a DataFrame.")
    if targets is None:
        raise ValueError("the model was fitted on pairs (X, y), so the target has no column name: name it, target=...")
    if preprocessing.is_vector and len(targets) != 1:
        raise ValueError(f"target names {', '.join(targets)}, but the model has one target: name that alone.")
    for name in targets:
        if name not in known.columns:
            raise ValueError(f"{names[0]} has no column {name!r}, the target.")
    take(names[0], known, targets)
    if len(asked) == 0:
        raise ValueError(f"{names[1]} has no rows.")
    min_confidence = None if max_error is None else fitted.min_confidence(max_error)
    groups = _groups(known, asked, task, names)
    y = known[targets[0]] if preprocessing.is_vector else known[list(targets)]
    _require_priors(fitted, groups, names)
    if preprocessing.is_regression or preprocessing.class_labels is not None:
        prediction = _of_shared_targets(fitted, preprocessing, known, y, asked, groups, names)
    else:
        prediction = _of_own_classes(fitted, known, y, asked, groups)
    if isinstance(prediction, ClassPrediction):
        prediction = dataclasses.replace(prediction, min_confidence=min_confidence)
    return prediction


def _groups(known: Any, asked: Any, task: str | None, names: tuple[str, str]) -> dict[Any, _Group]:
    """Returns the groups of the asked rows by their names."""
    if task is None:
        return {None: _Group(torch.arange(len(known)), torch.arange(len(asked)))}
    of_known, of_asked = (_rows(table, task, name) for table, name in zip((known, asked), names, strict=True))
    are_text = [{isinstance(group, str) for group in rows} for rows in (of_known, of_asked)]
    if all(are_text) and not are_text[0] & are_text[1]:
        kinds = ["text" if True in each else "no text" for each in are_text]
        raise TypeError(
            f"column {task!r} of {names[0]} holds {kinds[0]}, that of {names[1]} {kinds[1]}, so that no group would "
            "find its rows: convert both to one type."
        )
    if of_known and not of_known.keys() & of_asked.keys():
        warnings.warn(
            f"no group of {names[1]} is among those of {names[0]}, so that each gets the prior's prediction: are they "
            f"named alike in column {task!r}, such as {next(iter(of_asked))!r} and {next(iter(of_known))!r}?",
            RuntimeWarning,
            stacklevel=2,
        )
    nothing = np.arange(0)
    return {
        group: _Group(torch.from_numpy(of_known.get(group, nothing)), torch.from_numpy(rows))
        for group, rows in of_asked.items()
    }


def _rows(table: Any, task: str, argument: str) -> Mapping[Any, Array]:
    if task not in table.columns:
        raise ValueError(
            f"{argument} has no column {task!r}, which says to which group a row belongs; its columns are "
            f"{', '.join(table.columns)}."
        )
    (column,) = take(argument, table, [task])
    complete(argument, column)
    return table.groupby(column, sort=False, observed=True).indices


def _require_priors(fitted: FittedModel, groups: Mapping[Any, _Group], names: tuple[str, str]) -> None:
    unknown = [name for name, group in groups.items() if not len(group.known)]
    if not unknown:
        return
    try:
        fitted.require_prior()
    except ValueError as error:
        # Tables of one group have no name for it.
        which = "" if unknown == [None] else f" of {len(unknown)} groups of {names[1]}, such as {unknown[0]!r}"
        raise ValueError(f"{names[0]} has no rows{which}: {error}") from error


def _of_own_classes(
    fitted: FittedModel, known: Any, y: Any, asked: Any, groups: Mapping[Any, _Group]
) -> ClassPrediction:
    """Returns the prediction where each group has classes of its own, with the classes of all groups."""
    found: list[ClassPrediction] = []
    for name, group in groups.items():
        try:
            posterior = fitted.adapt(known.iloc[group.known.numpy()], y.iloc[group.known.numpy()], seed=0)
            prediction = posterior.predict(asked.iloc[group.asked.numpy()])
        except (ValueError, TypeError) as error:
            if name is None:
                raise
            raise type(error)(f"group {name!r}: {error}") from error
        assert isinstance(prediction, ClassPrediction)
        found.append(prediction)
    return ClassPrediction.joined(found, [group.asked for group in groups.values()])


def _of_shared_targets(
    fitted: FittedModel,
    preprocessing: Preprocessing,
    known: Any,
    y: Any,
    asked: Any,
    groups: Mapping[Any, _Group],
    names: tuple[str, str],
) -> Prediction:
    """Returns the prediction where targets mean the same in all groups."""
    labels = preprocessing.class_labels
    support = fitted.encode_support(known, y, labels, names=(names[0], f"the target of {names[0]}"))
    x = fitted.encode(names[1], asked)
    outputs = _outputs(fitted, support, x, list(groups.values()))
    prediction = fitted.prediction(outputs)
    if isinstance(prediction, MixturePrediction) and "output_variance" in outputs:
        prediction = dataclasses.replace(prediction, draw=_draw(fitted, support, x, list(groups.values())))
    return prediction.in_terms_of(labels=labels, is_vector=preprocessing.is_vector, as_numpy=True)


def _outputs(fitted: FittedModel, support: Batch, x: Tensor, groups: Sequence[_Group]) -> _Outputs:
    """Returns what a prediction is made of at all asked rows, in their order."""
    if fitted.model.examples_stand_alone:
        groups = _with_one_unknown(groups)
        answer = _solved_at_once if fitted.algorithm.uses_features else _solved_one_by_one
    else:
        # Features of a row hang on which rows are passed with it.
        answer = _solved_one_by_one
    rows, parts = zip(*answer(fitted, support, x, groups), strict=True)
    order = torch.cat(rows).argsort().to(x.device)
    return {
        name: torch.cat([part[name] for part in parts], _axis(name)).index_select(_axis(name), order)
        for name in parts[0]
    }


def _axis(name: str) -> int:
    """Returns the axis of the examples; see ``Algorithm.outputs``."""
    return 0 if name == "out_of_task" else 1


def _with_one_unknown(groups: Sequence[_Group]) -> list[_Group]:
    """Returns the groups, those without known rows as one: the posterior of each is the prior."""
    unknown = [group for group in groups if not len(group.known)]
    kept = [group for group in groups if len(group.known)]
    if not unknown:
        return kept
    return [*kept, _Group(unknown[0].known, torch.cat([group.asked for group in unknown]))]


def _solved_one_by_one(
    fitted: FittedModel, support: Batch, x: Tensor, groups: Sequence[_Group]
) -> Iterator[tuple[Tensor, _Outputs]]:
    for group in groups:
        posterior = fitted.solve(_select(support, group.known), None, seed=0, with_grad_norm=False)
        yield group.asked, fitted.outputs(posterior.value, x[group.asked.to(x.device)], seed=0)


def _solved_at_once(
    fitted: FittedModel, support: Batch, x: Tensor, groups: Sequence[_Group]
) -> Iterator[tuple[Tensor, _Outputs]]:
    """Heads are functions of features that work under ``vmap``: groups of equal size are one problem with an axis more.

    For many small groups the operations themselves cost next to nothing beside the calls of them.
    """
    algorithm = fitted.algorithm
    used = torch.cat([group.known for group in groups])
    support = _select(support, used)
    starts = np.cumsum([0, *(len(group.known) for group in groups)])
    model, known_shared, _ = fitted.on_features(support.x)
    _, asked_shared, _ = fitted.on_features(x)
    nll = dataclasses.replace(model, num_outputs=fitted.num_outputs(model.num_outputs, support.y))
    noise, evaluation_noise = fitted.inner_noise(seed=0), fitted.evaluation_noise(seed=0)

    def answer(positions: Tensor, targets: Tensor, asked: Tensor) -> _Outputs:
        meta = MetaParameters(fitted.meta.prior, known_shared)
        solution = algorithm.adapt(nll, meta, Batch(positions, targets), noise, with_grad_norm=False)
        return algorithm.outputs(model, asked_shared, solution.value, asked, evaluation_noise)

    of_size: dict[tuple[int, int], list[int]] = {}
    for index, group in enumerate(groups):
        # Up to the next power of two: the fewer sizes there are, the more groups are solved at once.
        of_size.setdefault((len(group.known), 2 ** (len(group.asked) - 1).bit_length()), []).append(index)
    for (num_known, num_asked), members in of_size.items():
        most = max(1, min(_MOST_AT_ONCE, _MOST_PRODUCTS // (num_known + num_asked) ** 2))
        for chunk in (members[start : start + most] for start in range(0, len(members), most)):
            first = torch.from_numpy(starts[chunk]).unsqueeze(-1)
            positions = (first + torch.arange(num_known)).to(x.device)
            # A row is predicted by itself: those that fill up, which are the last row, change nothing.
            asked = pad_sequence([groups[index].asked for index in chunk], batch_first=True, padding_value=-1)
            kept = torch.nonzero(asked.flatten() >= 0).flatten()
            with torch.no_grad():
                found = torch.func.vmap(answer)(positions, support.y[positions], asked.to(x.device))
            yield asked.flatten()[kept], {name: _in_a_row(name, value, kept) for name, value in found.items()}


def _in_a_row(name: str, values: Tensor, kept: Tensor) -> Tensor:
    """Returns outputs that are stacked by group with the groups one after the other along the axis of the examples."""
    axis = _axis(name)
    return values.movedim(0, axis).flatten(axis, axis + 1).index_select(axis, kept.to(values.device))


def _draw(fitted: FittedModel, support: Batch, x: Tensor, groups: Sequence[_Group]) -> Callable[[], Tensor]:
    """Returns what draws functions: those of one draw together within a group, and independent between groups."""

    def draw() -> Tensor:
        generator = noise_generator("prediction", 0)
        drawn: list[Tensor] = []
        for group in groups:
            posterior = fitted.solve(_select(support, group.known), None, seed=0, with_grad_norm=False)
            drawn.append(fitted.draw(posterior.value, x[group.asked.to(x.device)], generator=generator))
        order = torch.cat([group.asked for group in groups]).argsort().to(x.device)
        return torch.cat(drawn, 1)[:, order]

    return draw


def _select(examples: Batch, rows: Tensor) -> Batch:
    rows = rows.to(examples.x.device)
    return Batch(examples.x[rows], examples.y[rows])
