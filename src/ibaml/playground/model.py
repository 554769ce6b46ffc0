"""The tab *Your model*: what a saved learner is, and its predictions for uploaded examples."""

import base64
import binascii
import csv
import io
import math
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ibaml.data.sources.image_folder import IMAGE_SUFFIXES
from ibaml.learner import MetaLearner
from ibaml.learner.files import predict_files
from ibaml.playground.requests import Answered, Asked, field
from ibaml.recipes import runs

TABLES, ARCHIVE = (".csv", ".parquet"), ".zip"
MOST_UNPACKED = 256 * 2**20
MOST_SHOWN = 200


def answer(asked: Asked) -> Answered:
    """Says what a saved model is, and predicts if there are examples.

    Args:
        asked: ``folder``, that of a saved learner; ``support`` and ``query``, uploads ``{"name", "base64"}`` or none:
            tables, or for images a zip archive with class folders, and one with images.

    Returns:
        ``about``: pairs of a name and what it is; and with both uploads ``header`` and ``rows`` of the answers, the
        first ``MOST_SHOWN`` of ``num_rows``, and ``csv``, all of them.

    Raises:
        ImportError: If pandas is needed and absent.
        FileNotFoundError: If the folder holds no model.
        ValueError: If the model or an upload cannot be read, or they do not fit each other.
    """
    folder = field(asked, "folder", str).strip()
    if not folder:
        raise ValueError("no folder is named; expected that of a saved model, as learner.save(folder) writes it.")
    path = Path(folder).expanduser()
    # A recipe knows how files of its source are read.
    learner = MetaLearner.load(path).with_fitted(runs.load_fitted(path))
    told: Answered = {"about": [list(line) for line in describe(learner)]}
    uploads = [asked.get(name) for name in ("support", "query")]
    if not any(uploads):
        return told
    if not all(uploads):
        raise ValueError("one file is missing; expected both the examples that are known and those to predict.")
    header, rows, text = predict_uploads(learner, asked)
    return {**told, "header": header, "rows": rows[:MOST_SHOWN], "num_rows": len(rows), "csv": text}


def describe(learner: MetaLearner) -> list[tuple[str, str]]:
    """Returns what a fitted learner is, as names and values to read."""
    fitted, preprocessing = learner.fitted_model, learner.preprocessing
    likelihood = learner.likelihood
    predicts = f"numbers ({likelihood.name})"
    if likelihood.target_kind == "classes":
        labels = None if preprocessing is None else preprocessing.class_labels
        predicts = "classes that each task has of its own"
        if labels is not None:
            predicts = f"one of the classes {', '.join(map(str, labels.tolist()))}"
    about = [("predicts", predicts), ("algorithm", learner.algorithm.name)]
    if preprocessing is None:
        about.append(("inputs", "tensors that fit its network; files cannot tell what they are"))
    elif preprocessing.feature_names is not None:
        about.append(("inputs", "columns " + ", ".join(map(str, preprocessing.feature_names))))
    elif preprocessing.image_size is not None:
        height, width = preprocessing.image_size
        kind = "grey" if preprocessing.input_shape[0] == 1 else "colour"
        about.append(("inputs", f"images, {kind}, resized to {height} x {width}"))
    else:
        about.append(("inputs", f"arrays of shape {tuple(preprocessing.input_shape)}"))
    if preprocessing is not None and preprocessing.target_columns:
        about.append(("target", ", ".join(map(str, preprocessing.target_columns))))
    if preprocessing is not None and preprocessing.task_column is not None:
        about.append(("groups", f"column {preprocessing.task_column}"))
    if learner.choice is not None:
        about.append(("chosen", str(learner.choice)))
    temperature = fitted.temperature
    calibration = "predictions as they are" if temperature == 1 else f"made less sure by the factor {temperature:.2f}"
    return [*about, ("calibration", calibration)]


def predict_uploads(learner: MetaLearner, asked: Asked) -> tuple[list[str], list[list[Any]], str]:
    """Predicts uploaded examples, as ``ibaml predict`` does.

    Args:
        learner: A fitted learner.
        asked: ``support`` and ``query``, as ``answer`` takes them.

    Returns:
        Names of the columns, their rows with numbers to four digits, and the table as text.

    Raises:
        ImportError: If pandas is needed and absent.
        ValueError: If an upload cannot be read, or does not fit the model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        support, query = (_unpack(name, asked[name], folder) for name in ("support", "query"))
        try:
            predict_files(learner.fitted_model, support, query, folder / "answers.csv")
        except (ValueError, OSError) as error:
            # Where an upload lies meanwhile means nothing to whoever sent it.
            raise ValueError(str(error).replace(f"{folder}/", "")) from error
        text = (folder / "answers.csv").read_text(encoding="utf-8")
    header, *rows = csv.reader(io.StringIO(text))
    return header, [[_short(cell) for cell in row] for row in rows], text


def _unpack(name: str, upload: Any, folder: Path) -> Path:
    """Writes an upload into a folder and returns its path: a table, or the folder of an archive."""
    if not isinstance(upload, dict):
        raise ValueError(f"{name} is {type(upload).__name__}; expected an uploaded file.")
    given = field(upload, "name", str)
    suffix = PurePosixPath(given).suffix.lower()
    if suffix not in (*TABLES, ARCHIVE):
        raise ValueError(f"{given} is no table and no archive; expected a .csv, .parquet or .zip file.")
    try:
        content = base64.b64decode(field(upload, "base64", str), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{given} was not sent whole: {error}.") from error
    if suffix in TABLES:
        path = folder / f"{name}{suffix}"
        path.write_bytes(content)
        return path
    return _extract(given, content, folder / name)


def _extract(given: str, content: bytes, target: Path) -> Path:
    """Extracts the images of an archive, without folders that hold all the rest."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if _is_image(entry.filename)]
            if sum(entry.file_size for entry in entries) > MOST_UNPACKED:
                most = MOST_UNPACKED // 2**20
                raise ValueError(f"{given} holds more than {most} MiB of images; expected less: send smaller ones.")
            places = [PurePosixPath(entry.filename).parts for entry in entries]
            for entry, parts in zip(entries, _without_common_folders(places), strict=True):
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(entry))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{given} cannot be read as a zip archive: {error}") from error
    target.mkdir(exist_ok=True)
    return target


def _is_image(filename: str) -> bool:
    path = PurePosixPath(filename)
    is_plain = not path.is_absolute() and ".." not in path.parts and not filename.startswith("__MACOSX")
    return is_plain and path.suffix.lower() in IMAGE_SUFFIXES and "\\" not in filename and ":" not in filename


def _without_common_folders(places: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Cuts the folders that all files lie in, such as that which was packed."""
    found = list(places)
    while found and all(len(parts) > 1 for parts in found) and len({parts[0] for parts in found}) == 1:
        found = [parts[1:] for parts in found]
    return found


def _short(cell: str) -> str:
    try:
        value = float(cell)
    except ValueError:
        return cell
    return cell if not math.isfinite(value) or len(cell) <= 6 else f"{value:.4g}"
