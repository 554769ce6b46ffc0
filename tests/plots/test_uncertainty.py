import numpy as np
import pytest
import torch

from ibaml import plots
from ibaml.metrics import quantile_curve, selective_curve


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_selective_curves_draw_the_numbers_and_say_the_areas(texts) -> None:
    curves = {name: selective_curve(draws(2, 30, seed=i), draws(2, 30, seed=9) < 0.7) for i, name in enumerate("ab")}
    figure = plots.selective_curves(curves, title="Both")
    (axes,) = figure.axes
    for line, curve in zip(axes.lines, curves.values(), strict=True):
        np.testing.assert_allclose(line.get_xydata(), torch.stack(list(curve), -1))
    assert {"Both", "Share of examples answered", "Accuracy on them"} <= set(texts(figure))
    assert legend(axes) == [f"{name}, area {curve.area:.3f}" for name, curve in curves.items()]
    low, high = axes.get_ylim()
    assert high >= 1 and low < min(float(curve.accuracy[curve.coverage >= 0.1].min()) for curve in curves.values())


def test_quantile_curves_draw_the_numbers_and_the_diagonal(texts) -> None:
    curves = {name: quantile_curve(draws(3, 40, seed=i) ** 2) for i, name in enumerate("ab")}
    figure = plots.quantile_curves(curves)
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    for line, curve in zip(axes.lines[1:], curves.values(), strict=True):
        np.testing.assert_allclose(line.get_xydata(), torch.stack(list(curve), -1))
    assert legend(axes) == ["calibrated", "a", "b"] and "Share of targets below it" in texts(figure)


@pytest.mark.parametrize(
    ("draw", "curve"),
    [
        (plots.selective_curves, selective_curve(draws(1, 4), draws(1, 4) < 0.5)),
        (plots.quantile_curves, quantile_curve(draws(1, 4))),
    ],
)
@pytest.mark.parametrize("num_methods", [0, 8])
def test_too_few_or_too_many_methods_are_refused(draw, curve, num_methods) -> None:
    assert len(draw({str(i): curve for i in range(7)}).axes) == 1
    with pytest.raises(ValueError, match=f"curves holds {num_methods} methods; expected 1 to 7"):
        draw({str(i): curve for i in range(num_methods)})
