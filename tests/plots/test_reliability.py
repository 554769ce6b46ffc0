import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ibaml import plots
from ibaml.metrics import ReliabilityCurve


class TestReliabilityDiagram:
    def test_points_bars_and_numbers_are_those_of_the_curve(
        self, curve: Callable[..., ReliabilityCurve], texts: Callable[[Figure], list[str]]
    ) -> None:
        shown = curve()
        figure = plots.reliability_diagram({"MAML": shown, "iBaML": curve(1)}, title="Both")
        filled = shown.count > 0
        top, bottom = figure.axes[:2]
        points = top.lines[-1].get_xydata()
        np.testing.assert_allclose(points, torch.stack([shown.confidence, shown.accuracy], -1)[filled])
        assert [bar.get_height() for bar in bottom.patches] == shown.count.tolist()
        # The gap bars reach from the accuracy to the mean confidence.
        gaps = [bar.get_height() for bar in top.patches[int(filled.sum()) :]]  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_allclose(gaps, (shown.accuracy - shown.confidence).abs()[filled])
        assert f"ECE {shown.ece:.3f}\nMCE {shown.mce:.3f}" in texts(figure)
        assert {"Both", "MAML", "iBaML", "Accuracy", "Confidence", "Predictions"} <= set(texts(figure))

    @pytest.mark.parametrize("num_methods", [1, 2, 3, 4, 7])
    def test_two_panels_a_method(self, num_methods: int, curve: Callable[..., ReliabilityCurve]) -> None:
        figure = plots.reliability_diagram({f"method {i}": curve(i) for i in range(num_methods)})
        assert len(figure.axes) == 2 * num_methods

    def test_refuses_no_curve_and_an_empty_one(self, curve: Callable[..., ReliabilityCurve]) -> None:
        with pytest.raises(ValueError, match="curves is empty; expected at least one method"):
            plots.reliability_diagram({})
        empty = curve()._replace(count=torch.zeros(15))
        with pytest.raises(ValueError, match=re.escape("curves['a'] holds no predictions")):
            plots.reliability_diagram({"a": empty})
