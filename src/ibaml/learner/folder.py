"""The one format of a trained model on disk: a folder of safetensors and JSON, read without running code.

| file | what |
|---|---|
| model.safetensors | the chosen state, and in its header the settings and a checksum of both |
| model.json | the settings as text to read, with versions and the checksum of the tensors |

``MetaLearner.save``, ``MetaLearner.fit(run_folder=...)`` and ``ibaml train`` write it; a run folder has more files
beside these (``ibaml.learner.run_folder``). A byte changed in either file is noticed, as is a file of another format.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ibaml import algorithms, records
from ibaml.algorithms import Algorithm
from ibaml.algorithms.heads.empirical_bayes import Experience
from ibaml.algorithms.model import Model
from ibaml.atomic import write_text
from ibaml.data.augmentation import Augmentation
from ibaml.data.prepare import SplitSettings
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.raw import RawInputs
from ibaml.learner.choice import Choice
from ibaml.learner.settings import LearnerSettings
from ibaml.likelihoods import LIKELIHOODS
from ibaml.metrics import AbstentionCurve
from ibaml.networks import NetworkSettings, network_settings
from ibaml.posterior import FittedModel
from ibaml.train.checkpoint import (
    as_json,
    digest,
    first_difference,
    load_tensors,
    meta_from_tensors,
    meta_to_tensors,
    save_tensors,
)
from ibaml.types import Tensor

MODEL = "model.safetensors"
SETTINGS = "model.json"
MODEL_FORMAT = 3
"""Format of the folder."""

_MOST_OF_A_HEAD = 10_000_000
"""Weights of a last layer that a network may have beside those that its file holds."""

RECORDS: tuple[type, ...] = (
    LearnerSettings,
    NetworkSettings,
    SplitSettings,
    Augmentation,
    *algorithms.RECORDS,
    *LIKELIHOODS.values(),
)
"""The records that a model's settings consist of."""

_PACKAGES = ("ibaml", "torch", "numpy", "safetensors")
_SCALES = "preprocessing/"
_ABSTENTION = "abstention/"


class StoredModel(NamedTuple):
    """A model as it was read, before its network is built.

    Attributes:
        path: The file of the tensors, for messages.
        tensors: Meta-parameters, frozen parameters and buffers by name.
        settings: Settings of the learner.
        seed: Seed of the learner.
        splits: How tasks were split.
        preprocessing: How data become tensors; None if they came as tensors.
        temperature: Calibration temperature.
        raw_inputs: What tensors of training were like, if that is known.
        abstention: How often confident predictions of held-out tasks were wrong; None if that is not stored.
        experience: How many tasks the prior stands for; likewise.
        step: Meta-step of the state; None for a model that was not stored by training.
        choice: How the learner chose among candidates, if it did.
        backbone: Settings and digest of the backbone, if it has one; see ``Extractor.settings``.
        network_text: What a module that is not of ``ibaml.networks`` printed as; None if that is not stored.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: LearnerSettings
    seed: int
    splits: SplitSettings
    preprocessing: Preprocessing | None
    temperature: float
    abstention: AbstentionCurve | None
    raw_inputs: RawInputs | None
    experience: Experience | None
    step: int | None
    choice: Choice | None
    backbone: Mapping[str, Any] | None = None
    network_text: str | None = None

    def build_network(self) -> nn.Module:
        """Builds the network that the settings name.

        Raises:
            ValueError: If it is not one of ``ibaml.networks``.
        """
        if self.settings.network is None:
            raise ValueError(
                f"{self.path} holds a network that is not one of ibaml.networks: pass a module of the same "
                "architecture, MetaLearner.load(folder, network=...)."
            )
        with _settings_of(self.path):
            dtype = next(value.dtype for name, value in self.tensors.items() if name.startswith("prior"))
            # Settings that somebody made may ask for any size.
            with torch.device("meta"):
                num_weights = sum(value.numel() for value in self.settings.network.build().parameters())
            # Of a head that tasks solve a network has weights, and the file its prior.
            if num_weights > sum(value.numel() for value in self.tensors.values()) + _MOST_OF_A_HEAD:
                raise ValueError(f"the network has {num_weights:,} weights, which the file does not hold")
            return self.settings.network.build().to(dtype)

    def restore(self, model: Model, algorithm: Algorithm, device: torch.device) -> FittedModel:
        """Returns the fitted model; frozen parameters and buffers are copied into the network.

        Raises:
            ValueError: If the model belongs to another network.

        Warns:
            RuntimeWarning: If a module of one's own has the same weights, but prints as something else.
        """
        self._require_same_settings(model.network)
        with _settings_of(self.path):
            like = algorithm.init(model.adapted, model.shared, generator=torch.Generator())
        meta = meta_from_tensors(self.tensors, like=like, source=str(self.path))
        _restore_fixed(self, fixed_tensors(model.frozen, model.network))
        self._warn_of_another_text(model.network)
        return FittedModel(
            model=model,
            algorithm=algorithm,
            meta=meta,
            preprocessing=self.preprocessing,
            device=device,
            temperature=self.temperature,
            abstention=self.abstention,
            experience=self.experience,
            step=self.step,
            raw_inputs=self.raw_inputs,
        )

    def _require_same_settings(self, network: nn.Module) -> None:
        given = network_settings(network)
        if self.settings.network is None or given is None:
            return
        stored, own = (as_json(dataclasses.asdict(one)) for one in (self.settings.network, given))
        if (difference := first_difference(stored, own, "network")) is not None:
            raise ValueError(
                f"{self.path} belongs to another network: {difference}. Leave network out: the file says how its "
                "own is built."
            )

    def _warn_of_another_text(self, network: nn.Module) -> None:
        if self.network_text is None or (text := repr(network)) == self.network_text:
            return
        lines = itertools.zip_longest(self.network_text.splitlines(), text.splitlines(), fillvalue="")
        stored, given = next((one.strip(), other.strip()) for one, other in lines if one != other)
        warnings.warn(
            f"the network has the weights that {self.path} holds, but is another: {given!r} in place of {stored!r}. "
            "Predictions are right only if both compute the same.",
            RuntimeWarning,
            stacklevel=4,
        )


def write_model(
    folder: Path,
    fitted: FittedModel,
    *,
    settings: LearnerSettings,
    seed: int,
    splits: SplitSettings,
    choice: Choice | None = None,
) -> Path:
    """Writes a model and returns its folder, for ``read_model``.

    Args:
        folder: Created if absent.
        fitted: The model.
        settings: Settings of its learner.
        seed: Seed of its learner.
        splits: How tasks were split.
        choice: How its learner chose among candidates, if it did.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = fitted.preprocessing
    scales = {} if preprocessing is None else preprocessing.tensors()
    abstention = {} if fitted.abstention is None else fitted.abstention._asdict()
    tensors = {
        **meta_to_tensors(fitted.meta),
        **fixed_tensors(fitted.model.frozen, fitted.model.network),
        **{f"{_SCALES}{name}": value for name, value in scales.items()},
        **{f"{_ABSTENTION}{name}": value for name, value in abstention.items()},
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        "model_format": MODEL_FORMAT,
        "versions": {name: version(name) for name in _PACKAGES},
        "step": fitted.step,
        "learner": records.to_json(settings),
        "seed": seed,
        "splits": records.to_json(splits),
        "preprocessing": None if preprocessing is None else preprocessing.settings(),
        "raw_inputs": None if fitted.raw_inputs is None else fitted.raw_inputs._asdict(),
        "calibration_temperature": fitted.temperature,
        "experience": None if fitted.experience is None else fitted.experience._asdict(),
        "choice": None if choice is None else choice._asdict(),
        "backbone": None if fitted.backbone is None else fitted.backbone.settings(),
        "network_text": repr(fitted.model.network) if settings.network is None else None,
        "tensors_sha256": digest(plain),
    }
    save_tensors(folder / MODEL, plain, metadata)
    write_text(folder / SETTINGS, _as_text(metadata))
    return folder


def read_model(folder: Path) -> StoredModel:
    """Reads what ``write_model`` wrote.

    Raises:
        FileNotFoundError: If there is no trained model.
        ValueError: If a file is damaged, foreign or of another format.

    Warns:
        RuntimeWarning: If the text beside the tensors is whole, but of another model.
    """
    path = folder / MODEL
    metadata = read_metadata(folder)
    tensors, _ = load_tensors(path)
    scales, abstention = (
        {name.removeprefix(group): value for name, value in tensors.items() if name.startswith(group)}
        for group in (_SCALES, _ABSTENTION)
    )
    with _settings_of(path):
        temperature = metadata["calibration_temperature"]
        if not 0 < temperature < math.inf:
            raise ValueError(f"calibration_temperature is {temperature}, and no positive number")
        settings, splits = (records.from_json(metadata[name], RECORDS) for name in ("learner", "splits"))
        if not (isinstance(settings, LearnerSettings) and isinstance(splits, SplitSettings)):
            raise ValueError("they are those of something else than a learner")
        preprocessing = metadata["preprocessing"]
        return StoredModel(
            path,
            tensors,
            settings=settings,
            seed=metadata["seed"],
            splits=splits,
            preprocessing=None if preprocessing is None else Preprocessing.restore(preprocessing, scales),
            temperature=temperature,
            # A folder without it, as of a model that is not calibrated or of an earlier version, is read all the same.
            abstention=AbstentionCurve(**abstention) if abstention else None,
            raw_inputs=None if metadata.get("raw_inputs") is None else _raw(metadata["raw_inputs"]),
            experience=None if metadata.get("experience") is None else Experience(**metadata["experience"]),
            step=metadata["step"],
            choice=None if metadata.get("choice") is None else Choice(**metadata["choice"]),
            backbone=metadata.get("backbone"),
            network_text=metadata.get("network_text"),
        )


def _raw(stored: Mapping[str, Any]) -> RawInputs:
    return RawInputs(tuple(stored["shape"]), bool(stored["is_floating_point"]), stored["low"], stored["high"])


@contextlib.contextmanager
def _settings_of(path: Path) -> Generator[None]:
    """Names the file whose settings cannot be used; a checksum tells damage, not what was written on purpose."""
    try:
        yield
    # RuntimeError: torch's, of a network that does not fit into memory; StopIteration: a model without a prior.
    except (
        *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
        *(RuntimeError, MemoryError, StopIteration),
    ) as error:
        raise ValueError(
            f"{path} holds settings that this version of ibaml cannot use ({str(error) or type(error).__name__}): it "
            "was written by another version, or changed. Restore it from a copy."
        ) from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads the settings of a model alone, with its step and versions; errors are those of ``read_model``."""
    path = folder / MODEL
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MODEL}: it holds no trained model, or a run that has not reached its first validation."
        )
    _, metadata = load_tensors(path)
    if "model_format" not in metadata:
        raise ValueError(f"{path} is no trained model: it was not written by MetaLearner.save or training.")
    found = metadata["model_format"]
    if found != MODEL_FORMAT:
        raise ValueError(
            f"{path} has model format {found}, but this version of ibaml reads {MODEL_FORMAT}: it was written by "
            f"ibaml {metadata.get('versions', {}).get('ibaml', 'of another version')}; use that version."
        )
    settings = folder / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}, which belongs to {MODEL}: copy the folder as a whole.")
    text = settings.read_bytes()
    # Models of an earlier version have no checksum in the text.
    if text not in (_as_text(metadata).encode(), _as_text(metadata, with_checksum=False).encode()):
        if not _is_whole(text):
            raise ValueError(
                f"{settings} is not the one that was saved with {MODEL}: it was changed. Restore the folder from a "
                "copy."
            )
        warnings.warn(
            f"{settings} was saved with another model than {MODEL}, as when saving over a model ends between the two "
            f"files. The settings are those in {MODEL}; saving again mends the text.",
            RuntimeWarning,
            stacklevel=3,
        )
    return metadata


def fixed_tensors(frozen: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Returns what training leaves alone but predictions depend on: frozen parameters and the module's buffers."""
    named = {f"frozen/{name}": value for name, value in frozen.items()}
    return named | {f"buffer/{name}": value for name, value in network.named_buffers()}


def _restore_fixed(stored: StoredModel, into: Mapping[str, Tensor]) -> None:
    """Copies frozen parameters and buffers into those of a network, as ``fixed_tensors`` names them.

    Raises:
        ValueError: If one is missing or of another shape.
    """
    for name, value in into.items():
        found = stored.tensors.get(name)
        if found is None or found.shape != value.shape:
            came = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise ValueError(
                f"{stored.path} belongs to another network: {name} {came}, the model's has shape {tuple(value.shape)}."
            )
        value.copy_(found)


def _as_text(metadata: Mapping[str, Any], *, with_checksum: bool = True) -> str:
    # Through JSON once, so that what was just saved and what was read back give the same bytes.
    values = json.loads(json.dumps(dict(metadata)))
    if with_checksum:
        values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _is_whole(text: bytes) -> bool:
    """Tells whether a text is one that ``_as_text`` made of some settings."""
    try:
        values = json.loads(text)
        del values["sha256"]
        return text == _as_text(values).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
