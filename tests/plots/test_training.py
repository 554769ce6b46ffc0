import math
import re

import numpy as np
import pytest
import torch

from ibaml import plots


class TestTrainingCurves:
    def test_panels_follow_what_is_present(self) -> None:
        history = [{"step": 10 * i, "outer_loss": 2.0, "accuracy": 0.5, "inner_grad_norm": 0.1} for i in range(5)]
        history[2]["validation_accuracy"] = 0.75
        history[3]["linear_residual"] = math.nan
        figure = plots.training_curves(history)
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == ["Loss (nats per example)", "Accuracy (%)", "Inner gradient norm"]
        training, validation = figure.axes[1].lines
        np.testing.assert_allclose(training.get_xydata(), [[10 * i, 50] for i in range(5)])
        np.testing.assert_allclose(validation.get_xydata(), [[20, 75]])
        assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log"]

    def test_a_long_run_shows_raw_and_smooth(self) -> None:
        values = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        figure = plots.training_curves([{"step": i, "loss": float(v)} for i, v in enumerate(values)])
        raw, smooth = (np.asarray(line.get_ydata()) for line in figure.axes[0].lines)
        np.testing.assert_allclose(raw, values)
        # A window of 11, cut at the ends.
        assert smooth[200] == pytest.approx(values[195:206].mean().item())
        assert smooth[0] == pytest.approx(values[:6].mean().item())

    def test_logarithmic_panels_skip_zeros_and_smooth_geometrically(self) -> None:
        history = [{"step": i, "inner_grad_norm": 10.0 ** (i % 3 - 1) if i % 7 else 0.0} for i in range(200)]
        raw, smooth = (np.asarray(line.get_ydata()) for line in plots.training_curves(history).axes[0].lines)
        assert raw.min() == 0.1
        window = 2 * (len(raw) // 80) + 1
        half = window // 2
        middle = slice(100 - half, 100 + half + 1)
        assert smooth[100] == pytest.approx(np.exp(np.log(raw[middle]).mean()))

    def test_bad_input_is_refused(self) -> None:
        with pytest.raises(ValueError, match=re.escape("history[1] has the keys ['loss']; expected 'step' among them")):
            plots.training_curves([{"step": 0, "loss": 1.0}, {"loss": 1.0}])
        with pytest.raises(ValueError, match=re.escape("history holds ['linear_residual', 'step']; expected finite")):
            plots.training_curves([{"step": 0, "linear_residual": 0.0}])
        with pytest.raises(ValueError, match=re.escape("history holds []; expected")):
            plots.training_curves([])
