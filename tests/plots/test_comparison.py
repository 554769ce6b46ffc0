import math
import re
from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure

from ibaml import metrics, plots
from ibaml.types import Tensor


class TestComparison:
    def test_numbers_are_estimates_and_paired_differences(
        self, per_task: Callable[..., dict[str, dict[str, Tensor]]], texts: Callable[[Figure], list[str]]
    ) -> None:
        runs = per_task()
        found = texts(plots.comparison(runs))
        value = metrics.estimate(runs["run 1"]["nll"])
        assert f"{value.mean:.3f} ± {value.half_width:.3f}" in found
        change = metrics.paired_difference(runs["run 1"]["accuracy"], runs["run 0"]["accuracy"])
        assert f"{100 * change.mean:+.2f} ± {100 * change.half_width:.2f}" in found
        assert "Means over 50 tasks with 95% intervals" in plots.comparison(runs).get_supxlabel()

    def test_a_difference_is_filled_when_its_interval_excludes_zero(self) -> None:
        values = torch.tensor([0.1, 0.2, 0.3, 0.4])
        shift = torch.tensor([0.01, -0.01, 0.01, -0.01])
        runs = {"first": {"nll": values}, "same": {"nll": values + shift}, "other": {"nll": values + 1 + shift}}
        difference = plots.comparison(runs).axes[1]
        faces = [container.lines[0].get_markerfacecolor() for container in difference.containers]  # pyright: ignore[reportAttributeAccessIssue]
        assert faces[0] == "white"
        assert faces[1] != "white"

    def test_a_single_run_or_task_is_drawn(self, per_task: Callable[..., dict[str, dict[str, Tensor]]]) -> None:
        assert len(plots.comparison(per_task(1)).axes) == 3
        plots.comparison(per_task(2, num_tasks=1))

    def test_an_infinite_value_is_said_in_words(self) -> None:
        bad, good = torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])
        figure = plots.comparison({"a": {"nll": bad}, "b": {"nll": good}, "c": {"nll": bad}})
        assert [text.get_text() for text in figure.axes[0].texts if "±" not in text.get_text()] == ["infinite"] * 2
        assert [text.get_text() for text in figure.axes[1].texts] == ["minus infinite", "undefined"]

    def test_only_common_metrics_are_shown(self, per_task: Callable[..., dict[str, dict[str, Tensor]]]) -> None:
        runs = per_task(2)
        del runs["run 1"]["ece"]
        figure = plots.comparison(runs)
        assert [axes.get_title() for axes in figure.axes[::2]] == ["Accuracy", "Negative log-likelihood"]

    def test_bad_input_is_refused(self) -> None:
        with pytest.raises(ValueError, match=re.escape("per_task holds {'a': ['mse']}; expected every run to hold")):
            plots.comparison({"a": {"mse": torch.ones(3)}})
        with pytest.raises(ValueError, match=re.escape("per_task holds {}; expected")):
            plots.comparison({})
        with pytest.raises(ValueError, match=re.escape("per_task has {'a': 3, 'b': 2} values of nll")):
            plots.comparison({"a": {"nll": torch.ones(3)}, "b": {"nll": torch.ones(2)}})
