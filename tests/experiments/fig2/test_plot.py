"""The cost figure, read back from its artists."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibaml.experiments.fig2.plot import costs_figure
from ibaml.experiments.fig2.settings import AlgorithmName, CostPoint, Duration, Fig2Result, Fig2Settings

STEPS = (10, 1, 5)
CURVES: list[tuple[AlgorithmName, int | None]] = [
    ("maml", None),
    ("imaml", 5),
    ("imaml", 10),
    ("abml", None),
    ("ibaml", 5),
    ("ibaml", 10),
]


def cost(algorithm: AlgorithmName, num_inner_steps: int, num_linear_steps: int | None) -> CostPoint:
    num_hvps = num_inner_steps if num_linear_steps is None else num_linear_steps
    forward, backward = 0.1 * num_inner_steps, 0.2 * num_hvps
    if algorithm in ("abml", "ibaml"):
        backward *= 1.1
    times = [Duration(time, 0.9 * time, 1.3 * time) for time in (forward, backward, forward + backward)]
    return CostPoint(
        algorithm,
        num_inner_steps,
        num_linear_steps,
        *times,
        peak_bytes=450_000_000 if num_linear_steps else 480_000_000 + 28_000_000 * num_inner_steps,
        num_forward_gradients=num_inner_steps + 1,
        num_backward_gradients=1,
        num_hvps=num_hvps,
    )


def result(curves: list[tuple[AlgorithmName, int | None]] = CURVES) -> Fig2Result:
    points = [cost(algorithm, k, num_linear_steps) for algorithm, num_linear_steps in curves for k in STEPS]
    return Fig2Result(Fig2Settings(inner_steps=STEPS), "some processor, 2 thread(s), torch 2.13.0", points)


def values(axes: Axes, label: str) -> list[float]:
    """Heights of a curve, whose numbers of inner steps must be in rising order, whatever that of the result."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    assert list(line.get_xdata()) == sorted(STEPS)
    return [float(value) for value in line.get_ydata()]


@pytest.fixture(scope="module")
def figure() -> Figure:
    return costs_figure(result())


def test_four_panels_with_the_values_of_the_result(figure: Figure) -> None:
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Backward time (s)", "Peak memory (MB)", "Forward + backward time (s)", "Hessian-vector products"]
    backward, memory, total, products = figure.axes
    assert values(backward, "MAML") == pytest.approx([0.2, 1.0, 2.0])
    assert values(backward, "iBaML, L = 5") == pytest.approx([1.1, 1.1, 1.1])
    assert values(memory, "MAML") == pytest.approx([508, 620, 760])
    assert values(memory, "iMAML, L = 10") == pytest.approx([450, 450, 450])
    assert values(total, "MAML") == pytest.approx([0.3, 1.5, 3.0])
    assert values(products, "ABML") == [1, 5, 10]
    assert values(products, "iBaML, L = 10") == [10, 10, 10]
    for axes in figure.axes:
        assert len(axes.lines) == len(CURVES)
        assert axes.get_xlabel() == "Inner steps K"
        assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
        assert list(axes.get_xticks()) == [1, 5, 10]


def test_only_times_have_a_spread(figure: Figure) -> None:
    backward, memory, total, products = figure.axes
    assert [len(axes.collections) for axes in (memory, products)] == [0, 0]
    assert [len(axes.collections) for axes in (backward, total)] == [len(CURVES)] * 2
    segments = backward.collections[0].get_segments()  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(segments, [[(k, 0.18 * k), (k, 0.2 * k)] for k in (1, 5, 10)])


def test_one_disturbed_repeat_does_not_flatten_the_curves() -> None:
    calm = result()
    disturbed = calm.points[0]._replace(backward_seconds=Duration(2.0, 1.9, 50.0))
    top = costs_figure(calm._replace(points=[disturbed, *calm.points[1:]])).axes[0].get_ylim()[1]
    # The highest median, of iBaML and ABML with ten products each, and a tenth.
    assert top == pytest.approx(1.1 * 0.2 * 10 * 1.1)


def test_many_numbers_of_inner_steps_get_rounded_ticks() -> None:
    points = [cost("maml", k, None) for k in range(1, 41)]
    ticks = costs_figure(result()._replace(points=points)).axes[0].get_xticks()
    assert len(ticks) < 12
    assert all(float(tick).is_integer() for tick in ticks)


def test_every_curve_is_told_apart_without_its_colour(figure: Figure) -> None:
    (legend,) = figure.legends
    names = ["MAML", "iMAML, L = 5", "iMAML, L = 10", "ABML", "iBaML, L = 5", "iBaML, L = 10"]
    assert [text.get_text() for text in legend.get_texts()] == names
    looks = {(line.get_linestyle(), line.get_marker(), line.get_markerfacecolor()) for line in figure.axes[0].lines}
    assert len({(linestyle, marker, face == "none") for linestyle, marker, face in looks}) == len(CURVES)
    assert figure.get_suptitle() == "Cost of one hypergradient: some processor, 2 thread(s), torch 2.13.0"


def test_a_result_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match=r"result has no points; expected what ibaml.experiments.fig2.run returns."):
        costs_figure(result([]))
