"""What the tests of the figures share.

What a figure shows is read back from its artists; how it looks is judged by eye.
"""

from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure

from ibaml import metrics
from ibaml.metrics import ReliabilityCurve
from ibaml.types import Batch, Episode, Tensor


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _curve(seed: int = 0, sharpness: float = 2.0) -> ReliabilityCurve:
    source = _generator(seed)
    logits = sharpness * torch.randn(20, 30, 5, generator=source)
    return metrics.reliability_curve(logits.softmax(-1), torch.randint(5, (20, 30), generator=source))


def _image_task(num_classes: int = 3, num_support: int = 2, num_query: int = 4, channels: int = 1) -> Episode:
    def batch(num_each: int) -> Batch:
        x = torch.rand(num_each * num_classes, channels, 8, 8, generator=_generator())
        return Batch(x, torch.arange(num_classes).repeat(num_each))

    return Episode(batch(num_support), batch(num_query))


def _texts(figure: Figure) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    if figure.get_suptitle():
        found.append(figure.get_suptitle())
    for axes in figure.axes:
        labels = (axes.get_title(), axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())
        found += [*labels, *(text.get_text() for text in axes.texts)]
    return [text for text in found if text]


def _per_task(num_runs: int = 3, num_tasks: int = 50) -> dict[str, dict[str, Tensor]]:
    source = _generator(3)
    base = torch.randn(num_tasks, generator=source, dtype=torch.float64)

    def values(run: int) -> dict[str, Tensor]:
        noise = 0.01 * torch.randn(num_tasks, generator=source, dtype=torch.float64)
        return {"accuracy": 0.6 + 0.1 * run + 0.05 * base + noise, "nll": 1 - 0.05 * run - base, "ece": 0.1 + noise}

    return {f"run {run}": values(run) for run in range(num_runs)}


@pytest.fixture
def curve() -> Callable[..., ReliabilityCurve]:
    """Makes the curve of random predictions of five classes."""
    return _curve


@pytest.fixture
def image_task() -> Callable[..., Episode]:
    """Makes a task of random images."""
    return _image_task


@pytest.fixture
def texts() -> Callable[[Figure], list[str]]:
    """Reads all text of a figure, drawn or not yet."""
    return _texts


@pytest.fixture
def per_task() -> Callable[..., dict[str, dict[str, Tensor]]]:
    """Makes per-task metrics of several runs on the same tasks."""
    return _per_task
