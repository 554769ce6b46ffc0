"""Pen strokes as pictures that look like the characters of training: centred, of the same size, of one line width."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ibaml.data.sources.glyphs import INK_SHARE

Point: TypeAlias = tuple[float, float]
Strokes: TypeAlias = Sequence[Sequence[Point]]
"""Lines of a pen, each the points it went through from putting it down to lifting it; y grows downwards."""

IMAGE_SIZE = 28
LINE_WIDTH = 2.3
"""In pixels of the picture: that of the regular face of DejaVu Sans at this size, between its thin and bold ones."""

MOST_POINTS = 20_000
_OVERSAMPLING = 8
_LEAST_EXTENT = 1e-3


def read_strokes(argument: str, value: Any) -> list[list[Point]]:
    """Returns strokes as they come from a page, checked.

    Args:
        argument: Name for messages.
        value: A list of lists of ``[x, y]``.

    Raises:
        ValueError: If it is none, or a coordinate is not finite, or there are too many points.
    """
    try:
        strokes = [[(float(x), float(y)) for x, y in stroke] for stroke in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} is no list of strokes, each a list of points [x, y].") from error
    points = [point for stroke in strokes for point in stroke]
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        raise ValueError(f"{argument} has a point that is not finite.")
    if len(points) > MOST_POINTS:
        raise ValueError(f"{argument} has {len(points):,} points; expected at most {MOST_POINTS:,}: draw fewer lines.")
    return [stroke for stroke in strokes if stroke]


def draw(strokes: Strokes) -> npt.NDArray[np.uint8]:
    """Draws strokes as a picture, white (255) on black, whatever their place, size and line width were.

    The longer side of the ink, with the line's width, fills the share of the picture that it fills in training before
    its variations. A dot is drawn as one.

    Args:
        strokes: At least one point.

    Returns:
        Grey values, ``[1, 28, 28]``.

    Raises:
        ValueError: If there are no points.
    """
    from PIL import Image, ImageDraw

    points = np.array([point for stroke in strokes for point in stroke], dtype=np.float64)
    if not len(points):
        raise ValueError("there is nothing to draw: the strokes have no points.")
    low, high = points.min(0), points.max(0)
    extent = float((high - low).max())
    size, width = _OVERSAMPLING * IMAGE_SIZE, _OVERSAMPLING * LINE_WIDTH
    scale = (INK_SHARE * size - width) / extent if extent > _LEAST_EXTENT else 0.0
    picture = Image.new("L", (size, size))
    pen = ImageDraw.Draw(picture)
    for stroke in strokes:
        if not stroke:
            continue
        places = (np.array(stroke) - (low + high) / 2) * scale + size / 2
        pen.line([*map(tuple, places.tolist())], fill=255, width=round(width))
        for x, y in places.tolist():
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return np.asarray(picture.reduce(_OVERSAMPLING))[None]
