"""Drawings as a hand makes them: simple figures as strokes, with wobble, tilt, size and place of their own."""

import math

import numpy as np


def _arc(centre, radius, start=0.0, end=2 * math.pi, count=24):
    return [
        (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle))
        for angle in np.linspace(start, end, count)
    ]


def _star():
    corners = [(0.5 + 0.5 * math.sin(turn), 0.5 - 0.5 * math.cos(turn)) for turn in np.arange(6) * 0.8 * math.pi]
    return [corners]


FIGURES = {
    "circle": [_arc((0.5, 0.5), 0.5)],
    "cross": [[(0.5, 0), (0.5, 1)], [(0, 0.5), (1, 0.5)]],
    "triangle": [[(0.5, 0), (1, 0.9), (0, 0.9), (0.5, 0)]],
    "square": [[(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]],
    "zigzag": [[(0, 0.3), (0.25, 0.7), (0.5, 0.3), (0.75, 0.7), (1, 0.3)]],
    "spiral": [[(0.5 + 0.025 * a * math.cos(a), 0.5 + 0.025 * a * math.sin(a)) for a in np.linspace(0, 18, 60)]],
    "star": _star(),
    "arrow": [[(0, 0.5), (1, 0.5)], [(0.65, 0.15), (1, 0.5), (0.65, 0.85)]],
    "face": [_arc((0.5, 0.5), 0.5), [(0.35, 0.35), (0.35, 0.42)], [(0.65, 0.35), (0.65, 0.42)],
             _arc((0.5, 0.5), 0.28, 0.5, math.pi - 0.5)],
    "house": [[(0.1, 0.45), (0.1, 1), (0.9, 1), (0.9, 0.45)], [(0, 0.5), (0.5, 0), (1, 0.5)]],
    "wave": [[(x, 0.5 + 0.25 * math.sin(2 * math.pi * x)) for x in np.linspace(0, 1, 24)]],
    "ladder": [[(0.2, 0), (0.2, 1)], [(0.8, 0), (0.8, 1)], [(0.2, 0.25), (0.8, 0.25)], [(0.2, 0.5), (0.8, 0.5)],
               [(0.2, 0.75), (0.8, 0.75)]],
}  # fmt: skip
"""Figures in the unit square; y grows downwards."""


def sketch(figure, rng, *, wobble=0.03):
    """Returns the strokes of a figure on a canvas of 280 pixels, as one hand draws it once."""
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    scale = rng.uniform(0.35, 0.8, size=1) * np.exp(rng.uniform(-0.12, 0.12, size=2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[scale[0], shear * scale[0]], [0.0, scale[1]]])
    place = rng.uniform(0.42, 0.58, size=2)
    strokes = []
    for stroke in FIGURES[figure]:
        points = _finely(np.array(stroke))
        # A slow hand's error: noise that is smooth along the line.
        noise = rng.normal(size=(len(points) // 6 + 2, 2)) * wobble
        steps = np.linspace(0, len(noise) - 1, len(points))
        smooth = np.stack([np.interp(steps, np.arange(len(noise)), noise[:, axis]) for axis in (0, 1)], 1)
        places = ((points + smooth - 0.5) @ matrix.T + place) * 280
        strokes.append(places.tolist())
    return strokes


def _finely(points, step=0.05):
    """Puts points between those of a polygon, as a pen passes through them."""
    parts = [
        np.linspace(first, second, max(2, int(np.linalg.norm(second - first) / step)))
        for first, second in zip(points[:-1], points[1:], strict=True)
    ]
    return np.concatenate(parts)
