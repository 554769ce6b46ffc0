"""FS-Mol (Stanley et al. 2021): assays of a molecule's activity as binary classification tasks, and files like it.

A file holds assays as a table of measurements (assay, molecule, label) and one count fingerprint per molecule in
compressed sparse rows. Labels are 1 for active. A support set is stratified: its fraction of actives is the assay's.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from ibaml.checks import require_positive_int
from ibaml.data.files.locate import find_data_file
from ibaml.data.files.npz import load_npz
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.ragged import RaggedTasks
from ibaml.data.sources.base import Split, queries_in
from ibaml.types import Batch, Episode, Tensor

FILE_NAME = "fsmol_train_valid.npz"
"""Name of the file with FS-Mol's training and validation assays."""

_MOST_BYTES = 2**31
_ARRAYS = ("task_name", "task_split", "row_task", "row_mol", "label", "fp_ptr", "fp_index", "fp_count")

Fingerprints = Literal["log_counts", "counts", "binary"]
"""How counts become network inputs: ``log(1 + count)``, the counts themselves, or whether there are any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSMol:
    """Activity of molecules in assays.

    Training and validation tasks both come from FS-Mol's training assays (see ``hold_out``); its validation assays are
    the test.

    Attributes:
        support_sizes: Support sizes: each draw takes one of them.
        num_queries: Largest query set of a training task.
        num_test_queries: Query set of a validation or test task.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, or there is no support size or one below two.
    """

    support_sizes: tuple[int, ...] = (16, 32, 64)
    num_queries: int = 64
    num_test_queries: int = 64
    name: ClassVar[str] = "fsmol"
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_support_sizes(self.support_sizes)
        require_positive_int("num_queries", self.num_queries)
        require_positive_int("num_test_queries", self.num_test_queries)

    def sampler(self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu") -> "AssayTasks":
        """Loads the assays of a split and returns their sampler; see ``TaskSource.sampler``."""
        if split == "test":
            assays = load_assays("valid", root=data)
        else:
            learn, held_out = hold_out(load_assays("train", root=data))
            assays = learn if split == "train" else held_out
        num_queries = queries_in(self, split)
        # Half of the training assays have fewer than 50 rows.
        min_queries = min(16, num_queries) if split == "train" else None
        return AssayTasks(assays, support_sizes=self.support_sizes, num_queries=num_queries, min_queries=min_queries)

    def preprocessing(self) -> Preprocessing | None:
        """Returns None: fingerprints come with the data file alone."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assays:
    """Assays with the fingerprints of their molecules.

    Attributes:
        names: Name of each assay.
        rows: For each assay, the indices of its molecules, int64 of shape ``[num_rows]``.
        labels: For each assay, 1 for active and 0 for not, int64 of shape ``[num_rows]``.
        pointers: Where each molecule's entries start in ``positions`` and ``counts``, int64 ``[num_molecules + 1]``.
        positions: Nonzero fingerprint entries, all molecules one after the other.
        counts: Their counts.
        num_features: Length of a fingerprint.
    """

    names: tuple[str, ...]
    rows: tuple[npt.NDArray[np.int64], ...]
    labels: tuple[npt.NDArray[np.int64], ...]
    pointers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.uint8]
    num_features: int

    def __len__(self) -> int:
        """Number of assays."""
        return len(self.names)

    def fingerprints(self, molecules: npt.NDArray[np.int64], kind: Fingerprints = "log_counts") -> Tensor:
        """Returns fingerprints as a dense float32 tensor, ``[len(molecules), num_features]``.

        Args:
            molecules: Indices of molecules.
            kind: Transform of the counts.
        """
        starts, lengths = self.pointers[molecules], np.diff(self.pointers)[molecules]
        # Entry k of the gathered list is entry k - offset of its molecule.
        offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
        entries = np.repeat(starts, lengths) + np.arange(len(offsets)) - offsets
        dense = np.zeros((len(molecules), self.num_features), dtype=np.float32)
        dense[np.repeat(np.arange(len(molecules)), lengths), self.positions[entries]] = self.counts[entries]
        values = torch.from_numpy(dense)
        if kind == "binary":
            return (values > 0).float()
        return torch.log1p(values) if kind == "log_counts" else values

    def select(self, indices: Sequence[int]) -> "Assays":
        """Returns some of the assays, in the order given, over the same molecules."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[index] for index in indices),
            rows=tuple(self.rows[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
        )


def load_assays(
    split: str, *, root: str | os.PathLike[str] | None = None, path: str | os.PathLike[str] | None = None
) -> Assays:
    """Reads the assays of one split.

    The file is a ``.npz`` without pickled objects: ``task_name`` and ``task_split`` per assay; ``row_task``,
    ``row_mol`` and ``label`` (0 or 1) per measurement; ``fp_ptr``, ``fp_index`` and ``fp_count``, the count
    fingerprints in compressed sparse rows.

    Args:
        split: Which assays: those whose ``task_split`` is this; FS-Mol's are ``"train"`` and ``"valid"``.
        root: Folder to look for ``fsmol_train_valid.npz`` in first; see ``find_data_file``.
        path: Another file of the same layout, instead.

    Raises:
        FileNotFoundError: If the file is not found.
        ValueError: If the file is damaged or lacks the split.
    """
    file = find_data_file(FILE_NAME, root) if path is None else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; path must name a .npz file in the layout of FS-Mol's.")
    arrays = _read(file)
    splits = arrays["task_split"].astype(str)
    chosen = np.flatnonzero(splits == split)
    if len(chosen) == 0:
        raise ValueError(f"{file} has no assays of split {split!r}; it has {', '.join(sorted(set(splits.tolist())))}.")
    row_task = arrays["row_task"].astype(np.int64)
    order = np.argsort(row_task, kind="stable")
    bounds = np.searchsorted(row_task[order], np.arange(len(splits) + 1))
    rows, labels = arrays["row_mol"].astype(np.int64)[order], arrays["label"].astype(np.int64)[order]
    pieces = [slice(bounds[index], bounds[index + 1]) for index in chosen.tolist()]
    assays = Assays(
        names=tuple(arrays["task_name"].astype(str)[chosen].tolist()),
        rows=tuple(rows[piece] for piece in pieces),
        labels=tuple(labels[piece] for piece in pieces),
        pointers=arrays["fp_ptr"].astype(np.int64),
        positions=arrays["fp_index"],
        counts=arrays["fp_count"],
        num_features=2048,
    )
    for name, label in zip(assays.names, assays.labels, strict=True):
        if len(np.unique(label)) < 2:
            raise ValueError(f"{file}: assay {name} has {len(label)} rows of a single class; expected both labels.")
    return assays


def _read(file: Path) -> dict[str, npt.NDArray]:
    """Reads the arrays and refuses what does not fit together."""
    try:
        arrays = load_npz(file, _ARRAYS, most_bytes=_MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as an assay file: {error}.") from error
    for name, array in arrays.items():
        kinds = "U" if name in ("task_name", "task_split") else "iub"
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise ValueError(
                f"{file} is damaged: {name} has shape {array.shape} and dtype {array.dtype}, but expected a vector of "
                f"{'text' if kinds == 'U' else 'whole numbers'}."
            )
    num_tasks, num_rows = len(arrays["task_name"]), len(arrays["row_task"])
    num_molecules, num_entries = len(arrays["fp_ptr"]) - 1, len(arrays["fp_index"])
    problems = {
        "task_split and task_name differ in length": len(arrays["task_split"]) != num_tasks,
        "row_task, row_mol and label differ in length": {len(arrays["row_mol"]), len(arrays["label"])} != {num_rows},
        "row_task has indices out of range": _outside(arrays["row_task"], num_tasks),
        "row_mol has indices out of range": _outside(arrays["row_mol"], num_molecules),
        "label has values other than 0 and 1": not np.isin(arrays["label"], (0, 1)).all(),
        "fp_count and fp_index differ in length": len(arrays["fp_count"]) != num_entries,
        "fp_count has negative counts": bool((arrays["fp_count"] < 0).any()),
        "fp_index has entries of 2048 or more": _outside(arrays["fp_index"], 2048),
        "fp_ptr does not rise from 0 to the number of entries": num_molecules < 0
        or arrays["fp_ptr"][0] != 0
        or arrays["fp_ptr"][-1] != num_entries
        or bool((np.diff(arrays["fp_ptr"]) < 0).any()),
    }
    found = [problem for problem, holds in problems.items() if holds]
    if found:
        raise ValueError(f"{file} is damaged: {'; '.join(found)}.")
    return arrays


def _outside(values: npt.NDArray, bound: int) -> bool:
    return len(values) > 0 and bool(values.min() < 0 or values.max() >= bound)


class AssayTasks(RaggedTasks):
    """A TaskSampler over assays: a stratified support set, and a query set from the rest.

    A draw takes one support size, uniformly among ``support_sizes``, and assays with enough rows for it.

    Args:
        assays: The assays.
        support_sizes: Support sizes to draw from.
        num_queries: Largest query set.
        min_queries: Assays that leave fewer rows for the query set are not drawn. ``num_queries`` (the default) makes
            all query sets equal, which an evaluation needs.
        fingerprints: Transform of the counts.

    Raises:
        ValueError: If an argument is out of range, or no assay has enough rows for one of the support sizes.

    Examples:
        >>> import numpy as np
        >>> two = Assays(
        ...     names=("a", "b"),
        ...     rows=(np.arange(6), np.arange(6)),
        ...     labels=(np.array([0, 1] * 3), np.array([0, 0, 0, 1, 1, 1])),
        ...     pointers=np.arange(7),
        ...     positions=np.arange(6, dtype=np.uint16),
        ...     counts=np.ones(6, dtype=np.uint8),
        ...     num_features=8,
        ... )
        >>> tasks = AssayTasks(two, support_sizes=(4,), num_queries=2)
        >>> episode = tasks.sample(3, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.support.y.sum(-1), episode.query.y.shape
        (torch.Size([3, 4, 8]), tensor([2, 2, 2]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        assays: Assays,
        *,
        support_sizes: Sequence[int],
        num_queries: int,
        min_queries: int | None = None,
        fingerprints: Fingerprints = "log_counts",
    ) -> None:
        """Checks the arguments; see the class."""
        self.support_sizes = _check_support_sizes(support_sizes)
        self.num_queries = require_positive_int("num_queries", num_queries)
        self.min_queries = num_queries if min_queries is None else require_positive_int("min_queries", min_queries)
        if self.min_queries > num_queries:
            raise ValueError(f"min_queries must be at most num_queries ({num_queries}), got {min_queries}.")
        if fingerprints not in ("log_counts", "counts", "binary"):
            raise ValueError(f"fingerprints must be 'log_counts', 'counts' or 'binary', got {fingerprints!r}.")
        self.assays = assays
        self.fingerprints: Fingerprints = fingerprints
        super().__init__(torch.tensor([len(rows) for rows in assays.rows]), num_query=num_queries)
        for size in self.support_sizes:
            if not bool((self.capacities >= size + self.min_queries).any()):
                raise ValueError(
                    f"support_sizes has {size}, but no assay has the {size + self.min_queries} rows that this and "
                    f"{self.min_queries} queries take; the largest has {int(self.capacities.max())}."
                )

    @property
    def has_equal_sizes(self) -> bool:
        """Whether all draws have the same sizes."""
        return len(set(self.support_sizes)) == 1 and self.min_queries == self.num_query

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: the length of a fingerprint."""
        return (self.assays.num_features,)

    @property
    def num_outputs(self) -> int:
        """Number of classes: 2."""
        return 2

    def _draw(self, num_tasks: int, generator: torch.Generator) -> tuple[list[int], int]:
        size = self.support_sizes[int(torch.randint(len(self.support_sizes), (1,), generator=generator))]
        eligible = torch.nonzero(self.capacities >= size + self.min_queries).flatten()
        return eligible[torch.randint(len(eligible), (num_tasks,), generator=generator)].tolist(), size

    def episode(
        self, index: int, num_support: int | None = None, num_query: int | None = None, *, generator: torch.Generator
    ) -> Episode:
        """Draws one task from an assay, without a task axis; see ``RaggedTasks``.

        Raises:
            ValueError: If the assay has too few rows.
        """
        rows, labels = self.assays.rows[index], self.assays.labels[index]
        size = num_support or self.support_sizes[0]
        wanted = size + (num_query or 1)
        if len(rows) < wanted:
            raise ValueError(
                f"assay {self.assays.names[index]} has {len(rows)} rows, fewer than the {wanted} asked for: lower "
                "num_support or num_query."
            )
        support, rest = stratified_split(labels, size, generator=generator)
        return Episode(self._batch(rows, labels, support), self._batch(rows, labels, rest[:num_query]))

    def _batch(
        self, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
    ) -> Batch:
        return Batch(self.assays.fingerprints(rows[chosen], self.fingerprints), torch.from_numpy(labels[chosen]))


def _check_support_sizes(support_sizes: Sequence[int]) -> tuple[int, ...]:
    if not support_sizes:
        raise ValueError("support_sizes is empty; expected at least one support size.")
    sizes = tuple(require_positive_int("support_sizes", size) for size in support_sizes)
    if min(sizes) < 2:
        raise ValueError(f"support_sizes must be at least 2, one row of each class, got {sizes}.")
    return sizes


def stratified_split(
    labels: npt.NDArray[np.int64], num_support: int, *, generator: torch.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Splits rows at random into a support set with the same fraction of actives, and the rest.

    Args:
        labels: Labels 0 and 1, both present.
        num_support: Size of the support set, from 2 to one less than there are rows.
        generator: CPU generator.

    Returns:
        Indices of the support set and of the rest, each in random order.

    Examples:
        >>> support, rest = stratified_split(np.array([0, 0, 0, 1, 1, 1]), 4, generator=torch.Generator())
        >>> len(support), len(rest)
        (4, 2)
    """
    order = torch.randperm(len(labels), generator=generator).numpy()
    active = order[labels[order] == 1]
    inactive = order[labels[order] == 0]
    num_active = round(num_support * len(active) / len(labels))
    # One row of each class at least, and no more than there are.
    lowest, highest = max(1, num_support - len(inactive)), min(len(active), num_support - 1)
    num_active = min(max(num_active, lowest), highest)
    taken = np.zeros(len(labels), dtype=bool)
    taken[active[:num_active]] = True
    taken[inactive[: num_support - num_active]] = True
    return order[taken[order]], order[~taken[order]]


def hold_out(assays: Assays, *, every: int = 8, min_rows: int = 128) -> tuple[Assays, Assays]:
    """Splits training assays in two: those to learn from, and some to choose settings and checkpoints on.

    Of the assays with enough rows, every eighth by name is held out, so that the reported assays choose nothing.

    Args:
        assays: Assays of the training split.
        every: One of so many is held out.
        min_rows: Assays with fewer rows always stay with those to learn from.

    Returns:
        The assays to learn from, and those held out.

    Raises:
        ValueError: If that leaves none on either side.
    """
    large = sorted((name, index) for index, name in enumerate(assays.names) if len(assays.rows[index]) >= min_rows)
    held_out = {index for _, index in large[::every]}
    kept = [index for index in range(len(assays)) if index not in held_out]
    if not held_out or not kept:
        raise ValueError(
            f"{len(assays)} assays, {len(large)} of them with at least min_rows={min_rows} rows, leave none to hold "
            "out or none to learn from: lower min_rows, or raise every."
        )
    return assays.select(kept), assays.select(sorted(held_out))
