import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.image import imread

from ibaml import plots
from ibaml.metrics import Estimate, LearningCurve, ReliabilityCurve, quantile_curve, selective_curve
from ibaml.types import Batch, Episode, Tensor


def test_every_figure_is_drawn_without_pyplot_and_without_touching_the_settings(
    tmp_path: Path,
    curve: Callable[..., ReliabilityCurve],
    image_task: Callable[..., Episode],
    per_task: Callable[..., dict[str, dict[str, Tensor]]],
) -> None:
    before = dict(mpl.rcParams)
    line = Batch(torch.linspace(-1, 1, 7)[:, None], torch.zeros(7, 1))
    figures = {
        "reliability": plots.reliability_diagram({"a": curve(), "b": curve(1), "c": curve(2), "d": curve(3)}),
        "task": plots.example_task(image_task(channels=3), torch.full((12, 3), 1 / 3)),
        "regression": plots.example_regression(Episode(line, line), torch.zeros(7, 1), torch.ones(7, 1)),
        "training": plots.training_curves([{"step": i, "loss": 1.0, "inner_grad_norm": 0.3} for i in range(200)]),
        "loss": plots.training_curves([{"step": i, "loss": 1.0, "validation_nll": 2.0} for i in range(200)]),
        "learning": plots.learning_curve(
            LearningCurve(num_support=(0, 5), scores={"nll": (Estimate(1, 0.1, 9),) * 2}, num_tasks=9, num_left_out=0)
        ),
        "comparison": plots.comparison(per_task()),
        "selective": plots.selective_curves(
            {"a": selective_curve(torch.linspace(0, 1, 9)[None], torch.arange(9)[None] < 5)}
        ),
        "quantiles": plots.quantile_curves({"a": quantile_curve(torch.linspace(0, 1, 9)[None])}),
    }
    for name, figure in figures.items():
        path = plots.save(figure, tmp_path / f"{name}.png")
        pixels = imread(path)
        assert pixels.shape[1] >= 800
        # Not blank, and nothing dark on the outermost pixels: no text is cut off at an edge.
        assert pixels[..., :3].min() < 0.2
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])[:, :3]
        assert border.min() > 0.9, name
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
