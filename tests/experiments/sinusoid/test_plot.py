from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer

from ibaml.algorithms.gradient_based import num_inner_steps
from ibaml.experiments.sinusoid.plot import sinusoid_figure
from ibaml.experiments.sinusoid.run import (
    LEVELS,
    REFERENCE,
    SinusoidExample,
    SinusoidPoint,
    SinusoidResult,
    SinusoidRun,
    SinusoidSettings,
)
from ibaml.experiments.training import TrainedRun
from ibaml.metrics import Estimate
from ibaml.recipes import get_recipe
from ibaml.types import Batch, Episode


def example(index: int) -> SinusoidExample:
    x = torch.linspace(-5, 5, 30)[:, None]
    y = (1 + index) * torch.sin(x)
    task = Episode(Batch(x[::6], y[::6]), Batch(x, y))
    return SinusoidExample(task, 0 * x, torch.full_like(x, 4.0), y + 0.1, torch.full_like(x, 0.25))


def point(num_inner_steps: int, mse: float, is_bayesian: bool) -> SinusoidPoint:
    coverage = {level: Estimate(level - 0.02 * num_inner_steps, 0.01, 10) for level in LEVELS} if is_bayesian else {}
    width = {level: Estimate(level, 0.1, 10) for level in LEVELS} if is_bayesian else {}
    nll = Estimate(1.0, 0.1, 10) if is_bayesian else None
    return SinusoidPoint(num_inner_steps, Estimate(mse, 0.1 * mse, 10), nll, coverage, width)


def experiment(
    shots: tuple[int, ...] = (5, 10), algorithms: tuple[str, ...] = ("maml", "abml", "ibaml"), num_examples: int = 3
) -> SinusoidResult:
    found: list[SinusoidRun] = []
    for num_shots in shots:
        for index, name in enumerate(algorithms):
            recipe = get_recipe(f"sinusoid_{num_shots}shot_{name}")
            is_bayesian = recipe.algorithm.is_bayesian
            steps = sorted({1, 5, 10, num_inner_steps(recipe.algorithm)})
            points = tuple(point(k, (1 + index) / (k * num_shots), is_bayesian) for k in steps)
            examples = tuple(example(i) for i in range(num_examples)) if is_bayesian else ()
            num_steps = recipe.trainer.num_steps
            found.append(SinusoidRun(TrainedRun(recipe, Path(name), num_steps, 90, 6.0), points, examples))
    return SinusoidResult(SinusoidSettings(shots=shots, algorithms=algorithms), tuple(found))


def error_bars(axes: Any) -> list[ErrorbarContainer]:
    return [container for container in axes.containers if isinstance(container, ErrorbarContainer)]


def test_squared_errors_and_the_reference_are_drawn_for_each_number_of_shots() -> None:
    result = experiment()
    figure = sinusoid_figure(result)
    for axes, num_shots in zip(figure.axes, (5, 10), strict=False):
        assert axes.get_title() == f"Squared error, {num_shots} shots"
        assert axes.get_yscale() == "log"
        shown = [one for one in result.runs if one.num_shots == num_shots]
        bars = error_bars(axes)
        assert [bar.get_label() for bar in bars] == ["MAML", "ABML", "iBaML"]
        for bar, one in zip(bars, shown, strict=True):
            expected = [(p.num_inner_steps, p.mse.mean) for p in one.points]
            np.testing.assert_allclose(np.asarray(bar.lines[0].get_xydata()), expected)
            (limits,) = bar.lines[2]
            for segment, p in zip(limits.get_segments(), one.points, strict=True):
                np.testing.assert_allclose(segment[:, 1], [p.mse.low, p.mse.high])
        (stars,) = [line for line in axes.lines if line.get_marker() == "*"]
        np.testing.assert_allclose(np.asarray(stars.get_xydata()), list(REFERENCE[num_shots].items()))


def test_coverage_is_that_with_the_steps_of_training() -> None:
    result = experiment()
    axes = sinusoid_figure(result).axes[2]
    assert axes.get_title() == "Inside the intervals"
    bayesian = [one for one in result.runs if one.recipe.algorithm.is_bayesian]
    bars = error_bars(axes)
    assert len(bars) == 4
    for bar, one in zip(bars, bayesian, strict=True):
        covered = one.own_point.coverage
        expected = [(100 * level, 100 * covered[level].mean) for level in LEVELS]
        np.testing.assert_allclose(np.asarray(bar.lines[0].get_xydata()), expected)
        hollow = bar.lines[0].get_markerfacecolor() == "white"
        assert hollow == (one.num_shots == 10)
        # Nothing is cut off.
        assert min(y for _, y in expected) > axes.get_ylim()[0]
    assert "filled: 5 shots\nopen: 10 shots" in [text.get_text() for text in axes.texts]


def test_bands_are_the_central_intervals_before_and_after_adaptation() -> None:
    figure = sinusoid_figure(experiment())
    panels = figure.axes[3:]
    assert len(panels) == 6
    for index, axes in enumerate(panels):
        shown = example(index % 3)
        bands = [band for band in axes.collections if isinstance(band, PolyCollection)]
        assert len(bands) == 2
        for band, mean, deviation in zip(bands, (shown.prior_mean, shown.mean), (2.0, 0.5), strict=True):
            vertices = np.asarray(band.get_paths()[0].vertices)
            expected = torch.cat([mean - 1.6448536 * deviation, mean + 1.6448536 * deviation])[:, 0]
            assert set(np.round(vertices[:, 1], 4)) >= set(np.round(expected.double().numpy(), 4))
        truth, support = [line for line in axes.lines if line.get_label() in ("truth", "support")]
        np.testing.assert_allclose(np.asarray(truth.get_ydata()), shown.task.query.y[:, 0])
        np.testing.assert_allclose(
            np.asarray(support.get_xydata()), torch.cat([shown.task.support.x, shown.task.support.y], -1)
        )
        assert axes.get_ylim() == panels[0].get_ylim()
    labels = [axes.get_ylabel() for axes in panels if axes.get_ylabel()]
    assert [label.split("\n")[0] for label in labels] == ["ABML", "iBaML"]
    assert all("5 shots, K = " in label for label in labels)


@pytest.mark.parametrize(
    ("changes", "num_panels"),
    [
        ({"algorithms": ("maml",)}, 2),
        ({"num_examples": 0}, 3),
        ({"shots": (10,)}, 8),
        ({"shots": (10,), "algorithms": ("ibaml",), "num_examples": 1}, 3),
    ],
)
def test_what_there_is_not_gets_no_panel(changes: dict[str, Any], num_panels: int) -> None:
    assert len(sinusoid_figure(experiment(**changes)).axes) == num_panels


def test_unfinished_training_is_said_in_the_title() -> None:
    result = experiment()
    first, *others = result.runs
    assert sinusoid_figure(result).get_suptitle() == "Sinusoid regression"
    trained = first.trained._replace(num_steps=first.recipe.trainer.num_steps - 1)
    stopped = first._replace(trained=trained)
    figure = sinusoid_figure(result._replace(runs=(stopped, *others)))
    assert figure.get_suptitle() == "Sinusoid regression (training is not finished)"


def test_the_panels_and_the_legend_name_what_they_show() -> None:
    figure = sinusoid_figure(experiment())
    names = {axes.get_title() for axes in figure.axes} | {axes.get_xlabel() for axes in figure.axes}
    assert {"Inner steps K", "Nominal (%)", "Test task 2"} <= names
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"MAML", "iBaML", "calibrated", "before adaptation, 90% band", "truth", "support"} <= set(legend)
    assert len(legend) == len(set(legend))
