"""Features of inputs, computed once: a backbone on a device, with what it has computed before."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from ibaml.algorithms.kernels import require_rows_alone, time_first_layers
from ibaml.backbones.backbone import Backbone
from ibaml.backbones.cache import FeatureCache, Features
from ibaml.backbones.frozen import evaluation_mode, weights_stamp
from ibaml.backbones.inputs import (
    Inputs,
    by_position,
    call_with,
    concatenate,
    digests,
    num_inputs_of,
    read_backbone_inputs,
    shape_of,
    signature,
    take,
)
from ibaml.backbones.outputs import as_features
from ibaml.data.arrays import num_positions
from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.columns import as_table, is_table
from ibaml.types import Tensor

_VERSION = 1
"""Changes when the same inputs, weights and settings give other features."""

_INPUTS_OF_A_PART = 512

_OWN = ("digest", "column", "positions")
"""What is stored of an extractor that is no setting of the backbone."""

Progress = Callable[[int, int], None]
"""Called with the number of inputs done and of all."""


class Extraction(NamedTuple):
    """Features of several tasks.

    Attributes:
        features: Of each task, float32 ``[num_inputs, num_features]``.
        num_inputs: Different inputs.
        num_known: Those whose features were known before.
        num_bytes: Size of the backbone's features on disk; None if none are kept there.
    """

    features: list[Features]
    num_inputs: int
    num_known: int
    num_bytes: int | None

    def __str__(self) -> str:
        kept = "" if self.num_bytes is None else f"; {self.num_bytes / 1e6:.1f} MB are kept on disk"
        return f"Features of {self.num_inputs:,} inputs, {self.num_known:,} of them known before{kept}."


class Extractor:
    """A backbone on a device.

    Args:
        backbone: The backbone. Its module is not changed, also where it lies on another device: a copy computes then.
        device: Where to compute.
        inputs_of_a_part: Inputs after which features are written to disk.

    Attributes:
        backbone: The backbone.
        device: Where it computes.
        digest: Of the backbone when this was made; None for a function without a name.
        square_root: Whether the square root of features is taken; see ``Backbone``.
        column: Column of tables that holds the inputs, if training had tables.
        positions: Number of inputs side by side, if training had tuples of such; else 0.

    Raises:
        ValueError: If the weights changed since, at every use.
    """

    def __init__(self, backbone: Backbone, device: torch.device, *, inputs_of_a_part: int = _INPUTS_OF_A_PART) -> None:
        self.backbone = backbone
        self.device = device
        self.digest = backbone.digest()
        self.square_root = bool(backbone.square_root)
        self.column: str | None = None
        self.positions = 0
        self._inputs_of_a_part = inputs_of_a_part
        owner = backbone.owner
        self._stamp = None if owner is None else weights_stamp(owner)
        self._time_first = () if owner is None else time_first_layers(owner)
        self._copy: nn.Module | None = None
        self._memory: dict[bytes, Features] = {}
        # Where features depend on a function that only its name knows, they do not outlive it without one.
        self.cache = None if self.digest is None or not backbone.cache else FeatureCache(self._key(self.digest))

    @classmethod
    def restore(
        cls, stored: Mapping[str, Any] | None, backbone: Any, device: torch.device, *, source: str
    ) -> "Extractor | None":
        """Builds the extractor of a stored model of the backbone that the caller has, refusing another one.

        Args:
            stored: What ``settings`` returned; None if the model has no backbone.
            backbone: A module or callable, which gets the stored settings, or a ``Backbone``; None if there is none.
            device: Where to compute.
            source: Name of the folder, for messages.

        Raises:
            TypeError: If the backbone is none.
            ValueError: If the model has a backbone and there is none, or the reverse, or it is another one.
        """
        if stored is None:
            if backbone is not None:
                raise ValueError(f"backbone is given, but the model of {source} was trained without one: leave it out.")
            return None
        digest = stored["digest"]
        if backbone is None:
            named = "" if stored["name"] is None else f" {stored['name']!r}"
            raise ValueError(
                f"{source} holds a model on the features of a backbone{named} (digest {_short(digest)}), which is not "
                "stored: pass it, MetaLearner.load(folder, backbone=...)."
            )
        settings = {name: _as_setting(value) for name, value in stored.items() if name not in _OWN}
        if not isinstance(backbone, Backbone):
            backbone = Backbone(module=backbone, **settings)
        given = {name: _as_setting(value) for name, value in backbone.settings().items()}
        given["square_root"] = settings["square_root"] if backbone.square_root is None else backbone.square_root
        for name, value in settings.items():
            if given[name] != value:
                raise ValueError(
                    f"backbone has {name}={given[name]!r}, but the model of {source} was trained with {value!r}: give "
                    "the same, or the module alone."
                )
        found = cls(backbone, device)
        if found.digest != digest:
            raise ValueError(
                f"backbone has the digest {_short(found.digest)}, but the model of {source} was trained on the "
                f"features of {_short(digest)}: its weights or its structure differ; give the same backbone."
            )
        found.square_root = settings["square_root"]
        found.column, found.positions = stored.get("column"), stored.get("positions", 0)
        return found

    def settings(self) -> dict[str, Any]:
        """Returns the backbone's settings and digest, and what it reads of tables, as JSON values."""
        own = {"digest": self.digest, "column": self.column, "positions": self.positions}
        return {**self.backbone.settings(), "square_root": self.square_root, **own}

    def read(self, argument: str, x: Any) -> Inputs:
        """Returns inputs as ``read_backbone_inputs`` does, of a table the column that training had.

        Args:
            argument: How messages call the inputs.
            x: The inputs, or a table with them in one of its columns. A tuple of as many arrays as in training holds
                inputs side by side.

        Raises:
            TypeError, ValueError: As of ``read_backbone_inputs``; if there is no such column.
        """
        if self.column is None or not is_table(x):
            is_several = self.positions and isinstance(x, tuple) and len(cast("tuple[Any, ...]", x)) == self.positions
            return read_backbone_inputs(argument, by_position(x) if is_several else x)
        table = as_table(x)
        if self.column not in table.columns:
            raise ValueError(
                f"{argument} has no column {self.column!r}, which the backbone reads; it has "
                f"{', '.join(table.columns)}."
            )
        return read_backbone_inputs(f"column {self.column!r} of {argument}", table[self.column].tolist())

    def learn_form(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Sees by training tasks whether tuples hold inputs side by side, or examples as lists do.

        Args:
            pairs: Inputs and targets of each task.
        """
        tuples = ((x, y) for x, y in pairs if isinstance(x, tuple) and hasattr(y, "__len__"))
        self.positions = max((num_positions(x, len(y)) for x, y in tuples), default=0)

    def augmentation(self, of_images: Augmentation) -> Augmentation:
        """Returns what becomes of changes of images at every draw, where features stand in the place of these.

        Args:
            of_images: The changes.

        Raises:
            ValueError: If there are any: features are computed once for each image.
        """
        if of_images != UNCHANGED:
            raise ValueError(
                "augmentation changes images at every draw, and the features of a backbone are computed once for each: "
                "leave it out, learn a part of the backbone, MetaLearner(backbone=..., fine_tune=...), or train a "
                "network from its start, MetaLearner(network)."
            )
        return UNCHANGED

    def choose_root(self, features: Sequence[Features]) -> list[Features]:
        """Decides by features of training tasks whether the square root is taken, and returns them so.

        Args:
            features: From ``features_of_tasks``, before anything was decided.
        """
        if self.backbone.square_root is None:
            self.square_root = all(bool((each >= 0).all()) for each in features)
            return [self._transformed(each) for each in features]
        return list(features)

    def _transformed(self, features: Features) -> Features:
        if not self.square_root:
            return features
        length = np.linalg.norm(features, axis=1, keepdims=True)
        unit = features / np.where(length > 0, length, 1)
        return np.sign(unit) * np.sqrt(np.abs(unit))

    def features(self, argument: str, x: Any) -> Features:
        """Returns the features of inputs, computed now, ``[num_inputs, num_features]``.

        Args:
            argument: How messages call the inputs.
            x: At least one input.

        Raises:
            TypeError: If inputs or outputs are of no accepted form.
            ValueError: Likewise, or if features are not finite, or the weights have changed.
        """
        self._require_unchanged()
        inputs = self.read(argument, x)
        size, total = self.backbone.batch_size, num_inputs_of(inputs)
        batches = [take(inputs, range(start, min(start + size, total))) for start in range(0, total, size)]
        return self._transformed(np.concatenate([self._pass(argument, batch) for batch in batches]))

    def features_of_tasks(self, tasks: Sequence[tuple[str, Any]], *, on_progress: Progress | None = None) -> Extraction:
        """Returns the features of several tasks; equal inputs are computed once, and once for all with a cache.

        Args:
            tasks: How messages call the inputs of a task, and the inputs.
            on_progress: Called after each batch.

        Raises:
            TypeError, ValueError: As of ``features``.
        """
        self._require_unchanged()
        inputs = [(argument, self.read(argument, x)) for argument, x in tasks]
        named = [digests(each) for _, each in inputs]
        wanted = list(dict.fromkeys(digest for of_task in named for digest in of_task))
        known = {digest: self._memory[digest] for digest in wanted if digest in self._memory}
        if self.cache is not None:
            known |= self.cache.read([digest for digest in wanted if digest not in known])
        num_known = len(known)
        pending: list[bytes] = []

        def keep() -> None:
            if pending and self.cache is not None:
                self.cache.write(pending, np.stack([known[digest] for digest in pending]))
            pending.clear()

        try:
            for argument, some, batch in self._batches(inputs, named, known):
                known |= dict(zip(some, self._pass(argument, batch), strict=True))
                pending.extend(some)
                if len(pending) >= self._inputs_of_a_part:
                    keep()
                if on_progress is not None:
                    on_progress(len(known), len(wanted))
        finally:
            # What an interrupted extraction has computed is there when it is started again.
            keep()
        if self.cache is None:
            self._memory |= known
        return Extraction(
            [self._transformed(np.stack([known[digest] for digest in of_task])) for of_task in named],
            len(wanted),
            num_known,
            None if self.cache is None else self.cache.num_bytes,
        )

    def _batches(
        self, inputs: Sequence[tuple[str, Inputs]], named: Sequence[Sequence[bytes]], known: dict[bytes, Features]
    ) -> Iterator[tuple[str, list[bytes], Inputs]]:
        """Gives batches of the inputs whose features are not known, across tasks where these agree in shape."""
        seen = set(known)
        parts: list[Inputs] = []
        waiting: list[bytes] = []
        argument = ""
        for (name, each), of_task in zip(inputs, named, strict=True):
            if parts and signature(parts[0]) != signature(each):
                yield argument, waiting, concatenate(parts)
                parts, waiting = [], []
            for row, digest in enumerate(of_task):
                if digest in seen:
                    continue
                seen.add(digest)
                argument = argument if parts else name
                parts.append(take(each, [row]))
                waiting.append(digest)
                if len(waiting) == self.backbone.batch_size:
                    yield argument, waiting, concatenate(parts)
                    parts, waiting = [], []
        if parts:
            yield argument, waiting, concatenate(parts)

    def _pass(self, argument: str, batch: Inputs) -> Features:
        """Returns the features of one batch."""
        with evaluation_mode(self._owner()):
            found = self._computed(argument, batch)
            if self._time_first and len(found) > 1:
                alone = self._computed(argument, take(batch, [len(found) - 1]))
                require_rows_alone("the backbone", self._time_first, *map(torch.from_numpy, (alone, found)))
                self._time_first = ()
        if not np.isfinite(found).all():
            raise ValueError(
                f"the backbone gives features that are not finite for {argument}: its weights or its inputs are out of "
                "range; check what it expects (Backbone(mean=, std=) for images)."
            )
        return found

    def _computed(self, argument: str, batch: Inputs) -> Features:
        owner = self._owner()
        call: Callable[..., Any] = self.backbone.module if owner is None or owner is self.backbone.owner else owner
        named = {"0": batch} if isinstance(batch, torch.Tensor) else batch
        ready = named if isinstance(named, list) else {n: self._on_device(argument, v) for n, v in named.items()}
        try:
            outputs = call(ready) if isinstance(ready, list) else call_with(call, ready)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            name = getattr(call, "__name__", type(call).__name__)
            raise ValueError(
                f"the backbone ({name}) cannot process {argument}, {shape_of(batch)}: {error}. Several inputs of a "
                "module are a tuple of arrays, which it gets by position, or a mapping of them, by name."
            ) from error
        mask = None if isinstance(ready, list) else ready.get("attention_mask")
        return as_features(outputs, num_inputs_of(batch), mask).numpy()

    def _on_device(self, argument: str, values: Tensor) -> Tensor:
        values = self.backbone.prepare(argument, values)
        owner = self.backbone.owner
        weights = () if owner is None else (p for p in owner.parameters() if p.is_floating_point())
        dtype = next((weight.dtype for weight in weights), torch.float32)
        return values.to(device=self.device, dtype=dtype if values.is_floating_point() else None)

    def _owner(self) -> nn.Module | None:
        """Returns the module on the device: itself, or a copy if it lies elsewhere."""
        owner = self.backbone.owner
        if owner is None or owner is not self.backbone.module:
            return owner
        devices = {tensor.device for tensor in (*owner.parameters(), *owner.buffers())}
        if all(_is_same(device, self.device) for device in devices):
            return owner
        if self._copy is None:
            self._copy = copy.deepcopy(owner).to(self.device)
        return self._copy

    def _require_unchanged(self) -> None:
        owner = self.backbone.owner
        if owner is None or (stamp := weights_stamp(owner)) == self._stamp:
            return
        if self.backbone.digest() != self.digest:
            raise ValueError(
                "the backbone's weights have changed since the learner was fitted, and its features with them: fit "
                "again, or give the learner a copy (copy.deepcopy) that stays as it is."
            )
        self._stamp = stamp

    def _key(self, digest: str) -> str:
        text = json.dumps([_VERSION, digest, self.backbone.settings()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _as_setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(digest: str | None) -> str:
    return "unknown, as of a function without a name" if digest is None else digest[:16]


def _is_same(device: torch.device, other: torch.device) -> bool:
    return device.type == other.type and (device.index or 0) == (other.index or 0)
