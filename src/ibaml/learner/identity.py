"""What tells the data of a run from other data, so that a run folder is never resumed on others."""

from typing import Any

from ibaml import tree
from ibaml.data.augmentation import UNCHANGED
from ibaml.data.prepare import Source, SplitSettings
from ibaml.train.checkpoint import digest
from ibaml.train.evaluate import draw_tasks
from ibaml.types import TaskSampler, Tensor

_NUM_DRAWS = 4


def data_identity(source: Source, splits: SplitSettings) -> dict[str, Any]:
    """Returns JSON values that agree for the same data, columns, labels, scales and splits, and differ for others.

    Args:
        source: Samplers and preprocessing, as ``prepare`` gives them.
        splits: How tasks are split.

    Cost:
        Reads all data once. A sampler without ``content`` is known by the tasks that it draws.
    """
    described: dict[str, Any] = {}
    if source.preprocessing is not None:
        settings = source.preprocessing.settings()
        # Names first: the first difference is what a message shows, and a name says most.
        named = {name: settings[name] for name in ("task_column", "target_columns", "feature_names", "class_labels")}
        described = {**named, **settings, "splits": _described(splits)}
    return {
        **described,
        "training_tasks": digest_of_tasks(source.train),
        "validation_tasks": None if source.validation is None else digest_of_tasks(source.validation),
        # Tasks are digested as they are scaled, so that the scales are needed as well.
        "scales": None if source.preprocessing is None else digest(source.preprocessing.tensors())[:16],
    }


def _described(splits: SplitSettings) -> dict[str, Any]:
    changes = splits.augmentation
    described = {name: value for name, value in vars(splits).items() if name != "augmentation"}
    return described if changes == UNCHANGED else {**described, "augmentation": vars(changes)}


def digest_of_tasks(tasks: TaskSampler) -> str:
    """Returns a digest of a sampler's own ``content()``, or else of tasks drawn from it.

    Args:
        tasks: A sampler. Its ``content``, if it has one, returns the tensors and numbers that decide what is drawn.

    Returns:
        Hexadecimal digits; ``"not repeatable"`` if the same generator gives different tasks.
    """
    content = getattr(tasks, "content", None)
    if content is not None:
        return _digest(content())
    first, second = (_digest([draw_tasks(tasks, i, i + 1, seed=0) for i in range(_NUM_DRAWS)]) for _ in range(2))
    return first if first == second else "not repeatable"


def _digest(values: Any) -> str:
    leaves: list[Any] = list(tree.leaves(values))
    tensors = {str(i): leaf.cpu() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    text = repr([None if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    return digest(tensors, text)[:16]
