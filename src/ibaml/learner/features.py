"""Tasks of a learner with a backbone: their inputs become features, and all else is as for tables of numbers."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from ibaml.backbones import Extractor
from ibaml.backbones.cache import Features
from ibaml.backbones.samplers import FeatureEpisodes, FeatureTasks
from ibaml.data.augmentation import UNCHANGED
from ibaml.data.columns import is_table
from ibaml.data.episodes import EpisodeSampler
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.prepare import Source, SplitSettings, as_sampler, is_folder, is_raw, prepare
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.image_folder import load_class_folder
from ibaml.data.standardizer import IDENTITY, fit_standardizer
from ibaml.data.tables import TaskTable, read_tasks
from ibaml.likelihoods import TargetKind
from ibaml.posterior import FittedModel
from ibaml.train.progress import ProgressBar
from ibaml.types import Batch, ClassScope, Episode, TaskSampler, Tensor

if TYPE_CHECKING:
    from rich.console import Console

_NUM_TASKS_TO_SCALE_BY = 32


def prepare_features(
    extractor: Extractor,
    tasks: Any,
    validation: Any,
    *,
    target_kind: TargetKind,
    classes: ClassScope,
    splits: SplitSettings,
    seed: int,
    dtype: torch.dtype,
    columns: dict[str, Any],
    formula: str | None,
    console: "Console | None" = None,
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Computes the features of tasks, fits their scales on those of training alone, and builds samplers.

    Args:
        extractor: The backbone on a device.
        tasks: Training tasks: ``(X, y)`` pairs, a table with a column of inputs, a folder of class folders of images, a
            sampler, or Episodes.
        validation: As of ``prepare``.
        target_kind: As there.
        classes: As there.
        splits: As there.
        seed: As there.
        dtype: As there.
        columns: As there; the features are one column.
        formula: As there; it is of the columns of a table, so that there can be none.
        console: Where progress is shown, if anywhere.
        preprocessing: Scales and labels, if they are known; the shape of features is that of those that come. None:
            fitted.

    Raises:
        TypeError: If tasks are of no accepted form, or the validation tasks of another.
        ValueError: If they do not fit the backbone or each other.
    """
    if formula is not None:
        raise TypeError("formula says what becomes of several columns, and a backbone reads one: leave it out.")
    if is_table(tasks):
        table = read_tasks(tasks, **columns)
        extractor.column = _only_column(table)
        source = prepare_features(
            extractor,
            _pairs_of(table),
            _pairs_of(read_tasks(validation, **columns)) if is_table(validation) else validation,
            target_kind=target_kind,
            classes=classes,
            splits=splits,
            seed=seed,
            dtype=dtype,
            columns=dict.fromkeys(columns),
            formula=None,
            console=console,
            preprocessing=preprocessing,
        )
        assert source.preprocessing is not None
        names = {"task_column": table.task_column, "target_columns": table.target_columns}
        return source._replace(preprocessing=dataclasses.replace(source.preprocessing, **names))
    if is_table(validation):
        raise TypeError("validation_tasks is a table, but tasks is none: give both in one form.")
    how: dict[str, Any] = {"target_kind": target_kind, "classes": classes, "seed": seed, "dtype": dtype}
    if not is_raw(tasks) and not is_folder(tasks):
        given = None if isinstance(validation, float) else validation
        train, held_out = _features_of_pairs(extractor, [tasks, given], console, of_training=True)
        validation = validation if isinstance(validation, float) else held_out
        if preprocessing is not None:
            shape = next(np.shape(pair[0])[1:] for pair in _pairs(train).values() if _is_pair(pair))
            preprocessing = dataclasses.replace(preprocessing, input_shape=shape)
        return prepare(train, validation, splits=splits, columns=columns, preprocessing=preprocessing, **how)
    source = prepare(tasks, validation, splits=splits_of(extractor, splits, tasks), columns=columns, **how)
    if _has_images(source.train):
        extractor.augmentation(cast("EpisodeSampler", source.train).augmentation)  # Refused before long work.
    train, held_out = _pieces(source.train, seed=seed), _pieces(source.validation, seed=seed)
    found = extract(extractor, [("the tasks", piece) for piece in (*train, *held_out)], console, of_training=True)
    features = found[: len(train)]
    preprocessing = Preprocessing(
        inputs=fit_standardizer(features) if preprocessing is None else preprocessing.inputs,
        input_shape=features[0].shape[1:],
        num_outputs=source.train.num_outputs,
        targets=None if target_kind == "classes" else IDENTITY,
        class_labels=_labels(source.train, target_kind, classes),
        is_vector=False,
    )
    encode = _Encoder(extractor, preprocessing, dtype)
    validation = None if source.validation is None else encode.sampler(source.validation, found[len(train) :])
    return Source(encode.sampler(source.train, features), validation, preprocessing)


def tasks_of_features(fitted: FittedModel, tasks: Any, splits: SplitSettings) -> Any:
    """Returns held-out tasks in features: a sampler and Episodes scaled, pairs as pairs; unchanged without a backbone.

    Args:
        fitted: The fitted model.
        tasks: In any form that ``prepare_features`` takes.
        splits: Number of shots and queries of image folders.

    Raises:
        TypeError: If the tasks are a table, and those of training were none.
        ValueError: If they do not fit.
    """
    extractor, preprocessing = fitted.backbone, fitted.preprocessing
    if extractor is None or preprocessing is None:
        return tasks
    if is_table(tasks):
        tasks = _pairs_of(read_tasks(tasks, **_columns_of(extractor, preprocessing)))
    if not is_raw(tasks) and not is_folder(tasks):
        return _features_of_pairs(extractor, [tasks])[0]
    if is_folder(tasks):
        size = splits_of(extractor, splits, tasks)
        sampler: TaskSampler = EpisodeSampler(
            load_class_folder(tasks, image_size=size.image_size, channels=size.channels),
            num_ways=preprocessing.num_outputs,
            num_shots=splits.num_shots,
            num_queries=splits.num_query_images,
        )
    else:
        sampler = as_sampler(tasks)
    is_drawn = not isinstance(sampler, FixedEpisodes) and not _has_images(sampler)
    pieces = [] if is_drawn else _pieces(sampler, seed=0)
    features = extract(extractor, [("the tasks", piece) for piece in pieces])
    encoded = _Encoder(extractor, preprocessing, fitted.dtype).sampler(sampler, features)
    return encoded.episodes if isinstance(encoded, FixedEpisodes) else encoded


def without_augmentation(tasks: Any, splits: SplitSettings) -> tuple[Any, SplitSettings]:
    """Returns tasks whose images are the same at every draw, and how they are split.

    Args:
        tasks: As of ``prepare_features``.
        splits: As there.
    """
    if isinstance(tasks, EpisodeSampler) and tasks.augmentation != UNCHANGED:
        tasks = copy.copy(tasks)
        tasks.augmentation = UNCHANGED
    return tasks, dataclasses.replace(splits, augmentation=UNCHANGED)


def _only_column(table: TaskTable) -> str:
    names = table.feature_names or ()
    if len(names) != 1:
        raise ValueError(
            f"a backbone reads one column of a table, but there are {', '.join(names) or 'none'}: name it, such as "
            "features=['text'], or give pairs (X, y) of arrays."
        )
    return names[0]


def _pairs_of(table: TaskTable) -> dict[str, tuple[list[Any], Any]]:
    column = _only_column(table)
    return {task.name: (task.x[column].tolist(), task.y) for task in table.tasks}


def _columns_of(extractor: Extractor, preprocessing: Preprocessing) -> dict[str, Any]:
    if extractor.column is None or preprocessing.target_columns is None:
        raise TypeError("tasks is a table, but the model was trained on none: give pairs (X, y), as training had them.")
    target: Any = preprocessing.target_columns
    if preprocessing.is_vector or not preprocessing.is_regression:
        target = target[0]
    return {"task": preprocessing.task_column, "target": target, "features": [extractor.column]}


def splits_of(extractor: Extractor, splits: SplitSettings, tasks: Any) -> SplitSettings:
    """Returns how images are read for the backbone.

    Args:
        extractor: The backbone on a device.
        splits: How tasks are split.
        tasks: Tasks; what is no folder changes nothing.

    Raises:
        ValueError: If images are to be read and nothing says of which size.
    """
    backbone = extractor.backbone
    if not is_folder(tasks):
        return splits
    size = backbone.size or splits.image_size
    if size is None:
        raise ValueError(
            f"the backbone has no image_size, to which the images of {tasks} are resized: give "
            "Backbone(module=..., image_size=...)."
        )
    return dataclasses.replace(splits, image_size=size, channels=backbone.channels)


def extract(
    extractor: Extractor,
    tasks: Sequence[tuple[str, Any]],
    console: "Console | None" = None,
    *,
    of_training: bool = False,
) -> list[Features]:
    """Returns the features of several tasks, and shows progress.

    Args:
        extractor: The backbone on a device.
        tasks: As of ``Extractor.features_of_tasks``.
        console: Where progress is shown, if anywhere.
        of_training: Whether these tasks decide if the square root is taken.

    Raises:
        TypeError, ValueError: As of ``Extractor.features_of_tasks``.
    """
    if not tasks:
        return []
    with ProgressBar(console, "features") as bar:
        found = extractor.features_of_tasks(tasks, on_progress=bar.update)
        bar.say(str(found))
    return extractor.choose_root(found.features) if of_training else found.features


def _features_of_pairs(
    extractor: Extractor, several: Sequence[Any], console: "Console | None" = None, *, of_training: bool = False
) -> list[Any]:
    """Returns collections of pairs with features as inputs, computed together; what is no pair stays as it is."""
    named: list[tuple[str, Any]] = []
    for tasks in several:
        named += [(f"X of task {name!r}", pair[0]) for name, pair in _pairs(tasks).items() if _is_pair(pair)]
    if not named:
        return list(several)
    if of_training:
        extractor.learn_form(pair for tasks in several for pair in _pairs(tasks).values() if _is_pair(pair))
    features = iter(extract(extractor, named, console, of_training=of_training))

    def replaced(tasks: Any) -> Any:
        if not (pairs := _pairs(tasks)):
            return tasks
        return {name: (next(features), pair[1]) if _is_pair(pair) else pair for name, pair in pairs.items()}

    return [replaced(tasks) for tasks in several]


def _pairs(tasks: Any) -> dict[str, Any]:
    if isinstance(tasks, Mapping):
        return {str(name): pair for name, pair in cast("Mapping[Any, Any]", tasks).items()}
    if isinstance(tasks, Sequence) and not isinstance(tasks, str | bytes):
        return {str(index): pair for index, pair in enumerate(cast("Sequence[Any]", tasks))}
    return {}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(cast("Sequence[Any]", pair)) == 2 and not isinstance(pair, Episode)


def _labels(sampler: TaskSampler, target_kind: TargetKind, classes: ClassScope) -> Any:
    scope = getattr(sampler, "class_scope", classes)
    return np.arange(sampler.num_outputs) if target_kind == "classes" and scope == "shared" else None


def _has_images(sampler: TaskSampler | None) -> bool:
    # A subclass may draw other images than it has, such as turned ones.
    return type(sampler) is EpisodeSampler


def _pieces(sampler: TaskSampler | None, *, seed: int) -> list[Any]:
    """Returns the inputs of which a sampler makes its tasks; of one that does not say which, those of some tasks."""
    if sampler is None:
        return []
    if _has_images(sampler):
        return [cast("EpisodeSampler", sampler).images.images]
    if isinstance(sampler, FixedEpisodes):
        return [batch.x for episode in sampler.episodes for batch in episode]
    generator = torch.Generator().manual_seed(seed)
    drawn = [sampler.sample(1, generator=generator) for _ in range(_NUM_TASKS_TO_SCALE_BY)]
    return [batch.x[0] for episode in drawn for batch in episode]


class _Encoder(NamedTuple):
    """Makes samplers of scaled features."""

    extractor: Extractor
    preprocessing: Preprocessing
    dtype: torch.dtype

    def sampler(self, sampler: TaskSampler, features: Sequence[Features]) -> TaskSampler:
        """Returns the sampler of the same tasks, where ``features`` are those of its ``_pieces``."""
        if _has_images(sampler):
            episodes = cast("EpisodeSampler", sampler)
            changes = self.extractor.augmentation(episodes.augmentation)
            return FeatureEpisodes(episodes, self._scaled(features[0], episodes.images.images), changes)
        if isinstance(sampler, FixedEpisodes):
            of_pieces = iter(features)
            return FixedEpisodes(
                [
                    Episode(*(Batch(self._scaled(next(of_pieces), batch.x), batch.y) for batch in episode))
                    for episode in sampler.episodes
                ]
            )
        return FeatureTasks(
            sampler,
            # Not kept: a sampler that makes its inputs may never make the same one again.
            lambda x: self._scaled(self.extractor.features("the tasks", x), x),
            self.preprocessing.input_shape,
        )

    def _scaled(self, features: Features, inputs: Tensor) -> Tensor:
        return self.preprocessing.encode_inputs("the tasks", features, dtype=self.dtype).to(inputs.device)
