"""The tab *Draw*: classes of one's own from a few drawings each, and how sure the model is of one more."""

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ibaml.learner import MetaLearner
from ibaml.likelihoods import ClassPrediction
from ibaml.playground.none_of_these import Thresholds
from ibaml.playground.requests import Answered, Asked, field
from ibaml.playground.strokes import draw, read_strokes
from ibaml.playground.train import DRAWINGS, MODELS

MOST_CLASSES, MOST_DRAWINGS = 10, 5
MAX_ERROR = 0.05
"""Share of wrong labels that an answer may risk on tasks like those of validation."""

NONE_OF_THESE, UNSURE, TOO_FEW = "none of these", "not sure", "too few"


class _Models(NamedTuple):
    """What the tab needs."""

    learner: MetaLearner
    thresholds: Thresholds


@functools.cache
def _models() -> _Models:
    return _Models(MetaLearner.load(MODELS / DRAWINGS), Thresholds.load(MODELS / DRAWINGS))


def answer(asked: Asked) -> Answered:
    """Says what a drawing is, given drawings of some classes.

    Args:
        asked: ``examples``, a list of ``{"label", "strokes"}`` in the order in which they were drawn; ``query``, the
            strokes of the drawing to judge, which may be empty; ``history``, whether it is judged after each example.

    Returns:
        ``seen``: the query as the model sees it, a PNG as a data URL, or nothing; ``verdict``: a ``Verdict``, or null;
        ``history``: with ``history``, the verdicts after each example from which there are two classes.

    Raises:
        ValueError: If there are more classes or drawings than the tab takes, or strokes are none.
    """
    labels, pictures = _read_examples(field(asked, "examples", list))
    query = read_strokes("query", field(asked, "query", list))
    if not query:
        return {"seen": "", "verdict": None, "history": []}
    picture = draw(query)
    told = judge(pictures, labels, picture)
    history: list[Answered] = []
    if asked.get("history"):
        for count in range(2, len(labels) + 1):
            if len(set(labels[:count])) > 1:
                before = told if count == len(labels) else judge(pictures[:count], labels[:count], picture)
                history.append({"num_examples": count, "added": labels[count - 1], **before._asdict()})
    return {"seen": as_data_url(picture), "verdict": told._asdict(), "history": history}


class Verdict(NamedTuple):
    """What the model says of a drawing.

    Attributes:
        says: The label, or ``"none of these"``, ``"not sure"`` (of which class), ``"too few"`` (classes so far).
        labels: The classes, in alphabetical order.
        probabilities: Of each class, if it is one of them.
        total: Entropy of the label in nats.
        epistemic: Its part that more examples would remove.
        foreignness: The out-of-task score less the threshold: above 0 for none of the classes.
    """

    says: str
    labels: list[str]
    probabilities: list[float]
    total: float
    epistemic: float
    foreignness: float


def judge(pictures: npt.NDArray[np.uint8], labels: Sequence[str], query: npt.NDArray[np.uint8]) -> Verdict:
    """Judges one picture, given examples.

    Args:
        pictures: Examples, ``[num_examples, 1, 28, 28]``.
        labels: Their classes.
        query: The picture, ``[1, 28, 28]``.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        return Verdict(TOO_FEW, classes, [], 0.0, 0.0, 0.0)
    learner, thresholds = _models()
    prediction = learner.adapt(pictures, np.array(labels)).predict(query[None], max_error=MAX_ERROR)
    assert isinstance(prediction, ClassPrediction) and prediction.classes is not None
    foreignness = float(prediction.out_of_task[0]) - thresholds.at(len(classes), len(labels) / len(classes))
    says = str(prediction.labels[0])
    if foreignness > 0:
        says = NONE_OF_THESE
    elif prediction.abstains[0]:
        says = UNSURE
    return Verdict(
        says,
        [str(label) for label in prediction.classes],
        [float(value) for value in prediction.probs[0]],
        float(prediction.total_uncertainty[0]),
        float(prediction.epistemic[0]),
        foreignness,
    )


def as_data_url(picture: npt.NDArray[np.uint8]) -> str:
    """Returns a grey picture ``[1, height, width]`` as a PNG in a data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[0]).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read_examples(examples: list[Any]) -> tuple[list[str], npt.NDArray[np.uint8]]:
    labels = [field(example, "label", str).strip() for example in examples]
    if reserved := {"", NONE_OF_THESE, UNSURE, TOO_FEW} & set(labels):
        raise ValueError(f"a class is named {min(reserved)!r}; expected a name of its own.")
    counts = {label: labels.count(label) for label in labels}
    if len(counts) > MOST_CLASSES:
        raise ValueError(f"there are {len(counts)} classes; expected at most {MOST_CLASSES}: remove some.")
    for label, count in counts.items():
        if count > MOST_DRAWINGS:
            raise ValueError(f"class {label!r} has {count} drawings; expected at most {MOST_DRAWINGS}: remove some.")
    strokes = [read_strokes(f"a drawing of {example['label']!r}", example.get("strokes")) for example in examples]
    pictures = [draw(lines) for lines in strokes]
    return labels, np.stack(pictures) if pictures else np.empty((0, 1, 28, 28), np.uint8)
