import math

import numpy as np

from ibaml import plots
from ibaml.metrics import Estimate, LearningCurve


def test_each_score_has_a_panel_with_its_numbers_and_intervals(texts) -> None:
    scores = {
        "nll": (Estimate(1.5, 0.2, 9), Estimate(0.5, math.nan, 1)),
        "coverage_90": (Estimate(0.8, 0.1, 9), Estimate(0.91, 0.05, 9)),
    }
    curve = LearningCurve(num_support=(0, 10), scores=scores, num_tasks=9, num_left_out=0)
    figure = plots.learning_curve(curve, title="How many?")
    for axes, values in zip(figure.axes, scores.values(), strict=True):
        (bars,) = axes.containers
        line, _, (ends,) = bars
        np.testing.assert_allclose(line.get_xydata(), [[0, values[0].mean], [1, values[1].mean]])
        lengths = [segment[1, 1] - segment[0, 1] for segment in ends.get_segments()]
        np.testing.assert_allclose(lengths, np.nan_to_num([2 * value.half_width for value in values]))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10"]
    (ideal,) = (line for line in figure.axes[1].lines if line.get_linestyle() == "--")
    assert set(ideal.get_ydata()) == {0.9}
    assert {"How many?", "nll (nats)", "Coverage of 90% intervals", "Known rows"} <= set(texts(figure))
