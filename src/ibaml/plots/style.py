"""What the figures share: colours, markers, text sizes, margins, and how a figure is written.

Colours are those of Okabe and Ito (2008), told apart by readers with any common colour vision; no information is in the
colour alone. Text is sized to be read at 900 pixels of width.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ibaml.atomic import atomic_write

BLACK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#d9d9d9"
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
COLORS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", SKY, BLACK)
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
# Dots per inch of what is written, and the width of a full row of panels in inches.
DPI = 150
WIDTH = 9.0
# For matplotlib.rc_context.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}

Array = npt.NDArray[np.float64]


def look(place: int) -> dict[str, str]:
    """Returns colour and marker of a line in a legend, such that no two of 49 are alike.

    Examples:
        >>> look(0) == look(7), look(0)["color"] == look(7)["color"]
        (False, True)
    """
    turn, color = divmod(place, len(COLORS))
    return {"color": COLORS[color], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure whose panels, legend and titles make room for one another.

    Draw it, as all figures, within ``matplotlib.rc_context(STYLE)``: an artist takes its settings when it is made.

    Examples:
        >>> new_figure(WIDTH, 3.0).get_size_inches().tolist()
        [9.0, 3.0]

    Args:
        width: Width in inches; ``WIDTH`` for three panels in a row.
        height: Height in inches.

    Returns:
        The figure.
    """
    # Slightly wider margins than the default, so that no label touches the edge or its neighbour.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def shorten(text: str, length: int) -> str:
    """Cuts a name that is longer than its room, and marks the cut by an ellipsis.

    Examples:
        >>> shorten("tetrahedron", 6), shorten("cube", 6)
        ('tetra…', 'cube')

    Args:
        text: The name.
        length: The most letters that fit, at least 1.

    Returns:
        ``text``, or its first ``length - 1`` letters and the ellipsis.
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG at 150 dots per inch, atomically: a reader sees the old file or the new, never a part.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Figure(figsize=(1, 1)), f"{folder}/empty.png").name
        'empty.png'

    Args:
        figure: The figure.
        path: Where to; must end in ``.png``. Missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError: If the path does not end in ``.png``.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"path is {str(path)!r}; expected a name that ends in .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    return path
