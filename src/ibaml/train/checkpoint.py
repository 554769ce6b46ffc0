"""Checkpoints: one safetensors file with tensors and JSON, written in one move, read without running code."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ibaml import tree
from ibaml.algorithms import MetaParameters
from ibaml.atomic import atomic_write, keep_copy
from ibaml.metrics import AbstentionCurve
from ibaml.train.result import Chosen
from ibaml.train.settings import ONLY_HOW
from ibaml.types import Tensor

FORMAT = "ibaml-1"
"""Format of the files that this version writes and reads."""

CHECKPOINT = "checkpoint.safetensors"
"""The file in a run folder that training resumes from."""

PREVIOUS = f"previous.{CHECKPOINT}"
"""The one before, in case that is damaged."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata; an older file at ``path`` stays whole until the new one is complete.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device.
        metadata: JSON-serialisable values.

    Raises:
        OSError: If the file cannot be written; a file already at ``path`` is then unchanged.
    """
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(dict(metadata), sort_keys=True)
    header = {"format": FORMAT, "sha256": digest(contiguous, text), "json": text}
    try:
        with atomic_write(path) as temporary:
            save_file(contiguous, temporary, metadata=header)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of ``save_tensors``.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, changed, foreign, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({error}): it is truncated or not a safetensors file. Restore it from a "
            "copy, or remove it to start anew."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}, but this version reads {FORMAT!r}: it was written by another "
            "program or a newer version of ibaml."
        )
    if header.get("sha256") != digest(tensors, header.get("json", "")):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents. Restore it from a copy.")
    try:
        metadata = json.loads(header.get("json", ""))
        if not isinstance(metadata, dict):
            raise ValueError("they are no object")
    # A checksum tells damage, not what somebody wrote on purpose.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has settings that cannot be read ({error}). Restore it from a copy.") from error
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Returns the SHA-256 of a text and of all names, dtypes, shapes and bytes of CPU tensors."""
    value = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        value.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return value.hexdigest()


def meta_to_tensors(meta: MetaParameters) -> dict[str, Tensor]:
    """Flattens meta-parameters into named tensors, such as ``prior/mean/head.weight`` and ``shared/log_noise``."""
    return tree.named_leaves(meta)


def meta_from_tensors(tensors: Mapping[str, Tensor], *, like: MetaParameters, source: str) -> MetaParameters:
    """Rebuilds meta-parameters, refusing those of another network or algorithm.

    Args:
        tensors: What ``meta_to_tensors`` returned, possibly among other tensors.
        like: Meta-parameters of the model that is to take them; gives names, shapes, dtypes and devices.
        source: Name of the file, for messages.

    Raises:
        ValueError: If names or shapes differ, naming the first differences.
    """
    expected = meta_to_tensors(like)
    found = {name: value for name, value in tensors.items() if name.split("/")[0] in MetaParameters._fields}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"{source} belongs to another network or algorithm: {'; '.join(sorted(problems)[:5])}"
            f"{'; and more' if len(problems) > 5 else ''}. Build the model with the settings that it was trained with."
        )

    named = iter([found[name].to(dtype=value.dtype, device=value.device) for name, value in expected.items()])
    return tree.map(lambda leaf: next(named), like)


class TrainingState(NamedTuple):
    """All that decides the future of a run.

    Attributes:
        meta: Meta-parameters after the last step.
        chosen: The state that was chosen so far.
        optimizer: State of the optimiser by the number of the parameter, as ``state_dict()["state"]``.
        generator: State of the generator of tasks and noise.
        step: Steps taken.
        seconds: Seconds spent.
        is_validation_due: Whether the validation after that step has not been made.
        running: What has been measured since the last row of metrics, and which rows there are, JSON values.
    """

    meta: MetaParameters
    chosen: Chosen
    optimizer: dict[int, dict[str, Tensor]]
    generator: Tensor
    step: int
    seconds: float
    is_validation_due: bool = False
    running: Mapping[str, Any] = {}


def save_state(folder: Path, state: TrainingState, description: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a run.

    Args:
        folder: Run folder.
        state: What to write.
        description: JSON values that a resumed run has to agree with.

    Raises:
        OSError: If the file cannot be written; an older one is then unchanged.
    """
    tensors = meta_to_tensors(state.meta)
    # By number: the order of insertion after a resumption is not that of the parameters.
    for index, values in state.optimizer.items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    tensors["generator"] = state.generator
    tensors |= {f"best/{name}": value for name, value in meta_to_tensors(state.chosen.meta).items()}
    abstention = {} if state.chosen.abstention is None else state.chosen.abstention._asdict()
    tensors |= {f"abstention/{name}": value for name, value in abstention.items()}
    progress = {
        "step": state.step,
        "seconds": state.seconds,
        "best_step": state.chosen.step,
        "best_nll": state.chosen.nll if math.isfinite(state.chosen.nll) else None,
        "best_temperature": state.chosen.temperature,
        "is_validation_due": state.is_validation_due,
        "running": dict(state.running),
    }
    path = folder / CHECKPOINT
    if path.exists():
        keep_copy(path, folder / PREVIOUS)
    save_tensors(path, tensors, {**progress, "description": description})


def find_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the checkpoint of a run, or the one before if that is damaged.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If both are damaged, or of another format.

    Warns:
        RuntimeWarning: If it is the one before.
    """
    try:
        return load_tensors(folder / CHECKPOINT)
    except ValueError as error:
        try:
            tensors, metadata = load_tensors(folder / PREVIOUS)
        except (ValueError, FileNotFoundError):
            raise error from None
        warnings.warn(
            f"{error} Training goes on from the checkpoint before, of step {metadata.get('step')}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return tensors, metadata


def restore_state(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    like: MetaParameters,
    description: Mapping[str, Any],
    source: Path,
) -> TrainingState:
    """Rebuilds what ``save_state`` wrote, for a run that agrees with its description.

    Args:
        tensors: The tensors of the checkpoint, as ``load_tensors`` returns them.
        metadata: Its metadata.
        like: Meta-parameters of the run that is to go on.
        description: The description of that run.
        source: The file, for messages.

    Raises:
        ValueError: If it is no checkpoint of a training run, or of one with another network, other settings or other
            data, with the first difference.
    """
    if "step" not in metadata or "generator" not in tensors:
        raise ValueError(f"{source} is no training checkpoint: it holds a model without optimiser state.")
    # The tensors first: a mismatch there says plainly what is wrong.
    meta = meta_from_tensors(tensors, like=like, source=str(source))
    best, abstention = (
        {name.removeprefix(group): value for name, value in tensors.items() if name.startswith(group)}
        for group in ("best/", "abstention/")
    )
    chosen = Chosen(
        meta_from_tensors(best, like=like, source=str(source)),
        step=metadata["best_step"],
        nll=math.inf if metadata["best_nll"] is None else metadata["best_nll"],
        temperature=metadata["best_temperature"],
        abstention=AbstentionCurve(**abstention) if abstention else None,
    )
    difference = first_difference(metadata["description"], as_json(description))
    if difference is not None:
        what, advice = (
            ("on other data", "data") if difference.startswith("data.") else ("with other settings", "settings")
        )
        raise ValueError(
            f"{source} was trained {what}: {difference}. Use the same {advice} to resume, or another run folder to "
            "start anew."
        )
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            optimizer.setdefault(int(index), {})[key] = value
    return TrainingState(
        meta,
        chosen,
        optimizer,
        tensors["generator"],
        step=metadata["step"],
        seconds=metadata["seconds"],
        # A checkpoint of an earlier version has neither.
        is_validation_due=metadata.get("is_validation_due", False),
        running=metadata.get("running", {}),
    )


def load_progress(folder: Path) -> tuple[int, float]:
    """Returns the steps and seconds of training of a run folder, zero if it has no checkpoint.

    Raises:
        ValueError: If the checkpoint is damaged.
    """
    if not (folder / CHECKPOINT).is_file():
        return 0, 0.0
    metadata = load_tensors(folder / CHECKPOINT)[1]
    return int(metadata["step"]), float(metadata["seconds"])


def where_saved(run_folder: Path | None) -> str:
    """Says where the state before a failed step is."""
    if run_folder is None:
        return "The state before is lost, because there is no run folder to save it in."
    return f"The state before is saved in {run_folder / CHECKPOINT}."


def how_to_resume(run_folder: Path | None) -> str:
    """Says what a new start of the same command does."""
    if run_folder is None:
        return "The state is lost, because there is no run folder to save it in."
    if not (run_folder / CHECKPOINT).exists():
        return f"There is no checkpoint in {run_folder} yet: the same command starts anew."
    return (
        f"The last checkpoint is {run_folder / CHECKPOINT}: the same command resumes from it, with any number of "
        "processes."
    )


def first_difference(saved: Any, current: Any, path: str = "") -> str | None:
    """Describes the first place where two JSON values differ.

    More steps at a constant rate are no difference, nor is another way to compute the same.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        # In the order of the current one, which a writer chooses for its readers.
        for key in [*current, *sorted(saved.keys() - current.keys())]:
            is_longer = key == "num_steps" and saved.get("schedule") == "constant"
            if not (path.split(".")[-1] == "trainer" and (is_longer or key in ONLY_HOW)):
                found = first_difference(saved.get(key), current.get(key), f"{path}.{key}".lstrip("."))
                if found is not None:
                    return found
        return None
    return None if saved == current else f"{path} was {saved!r} and is now {current!r}"


def require_writable(folder: Path) -> None:
    """Creates the folder and a file in it, so that an unwritable place shows before any work.

    Raises:
        OSError: If it cannot be written.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"run_folder {folder} cannot be written ({error.strerror or error}): choose another with --run-folder, or "
            "change its permissions."
        ) from error


def as_json(value: Any) -> Any:
    """Returns the value as JSON would return it: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value
