"""What the figures show is read back from their artists; how they look is judged by eye."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from ibaml import metrics, plots
from ibaml.metrics import ReliabilityCurve
from ibaml.types import Batch, Episode, Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curve(seed: int = 0, sharpness: float = 2.0) -> ReliabilityCurve:
    source = generator(seed)
    logits = sharpness * torch.randn(20, 30, 5, generator=source)
    return metrics.reliability_curve(logits.softmax(-1), torch.randint(5, (20, 30), generator=source))


def image_task(num_classes: int = 3, num_support: int = 2, num_query: int = 4, channels: int = 1) -> Episode:
    def batch(num_each: int) -> Batch:
        x = torch.rand(num_each * num_classes, channels, 8, 8, generator=generator())
        return Batch(x, torch.arange(num_classes).repeat(num_each))

    return Episode(batch(num_support), batch(num_query))


def texts(figure: Figure) -> list[str]:
    """All text of a figure, drawn or not yet."""
    found = [text.get_text() for text in figure.texts]
    if figure.get_suptitle():
        found.append(figure.get_suptitle())
    for axes in figure.axes:
        labels = (axes.get_title(), axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())
        found += [*labels, *(text.get_text() for text in axes.texts)]
    return [text for text in found if text]


def per_task(num_runs: int = 3, num_tasks: int = 50) -> dict[str, dict[str, Tensor]]:
    source = generator(3)
    base = torch.randn(num_tasks, generator=source, dtype=torch.float64)

    def values(run: int) -> dict[str, Tensor]:
        noise = 0.01 * torch.randn(num_tasks, generator=source, dtype=torch.float64)
        return {"accuracy": 0.6 + 0.1 * run + 0.05 * base + noise, "nll": 1 - 0.05 * run - base, "ece": 0.1 + noise}

    return {f"run {run}": values(run) for run in range(num_runs)}


class TestSave:
    def test_writes_a_png_at_150_dots_per_inch(self, tmp_path: Path) -> None:
        path = plots.save(Figure(figsize=(2, 1)), tmp_path / "new" / "figure.png")
        assert imread(path).shape[:2] == (150, 300)
        assert [file.name for file in path.parent.iterdir()] == ["figure.png"]

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "figure.png"
        path.write_bytes(b"old")

        def half_written(_: Figure, target: Path, **__: object) -> None:
            target.write_bytes(b"part")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", half_written)
        with pytest.raises(OSError, match="disk full"):
            plots.save(Figure(), path)
        assert path.read_bytes() == b"old"
        assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]

    def test_other_formats_are_refused(self) -> None:
        with pytest.raises(ValueError, match=re.escape("path is 'figure.pdf'; expected a name that ends in .png")):
            plots.save(Figure(), "figure.pdf")


def test_every_figure_is_drawn_without_pyplot_and_without_touching_the_settings(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    line = Batch(torch.linspace(-1, 1, 7)[:, None], torch.zeros(7, 1))
    figures = {
        "reliability": plots.reliability_diagram({"a": curve(), "b": curve(1), "c": curve(2), "d": curve(3)}),
        "task": plots.example_task(image_task(channels=3), torch.full((12, 3), 1 / 3)),
        "regression": plots.example_regression(Episode(line, line), torch.zeros(7, 1), torch.ones(7, 1)),
        "training": plots.training_curves([{"step": i, "loss": 1.0, "inner_grad_norm": 0.3} for i in range(200)]),
        "loss": plots.training_curves([{"step": i, "loss": 1.0, "validation_nll": 2.0} for i in range(200)]),
        "comparison": plots.comparison(per_task()),
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


class TestReliabilityDiagram:
    def test_points_bars_and_numbers_are_those_of_the_curve(self) -> None:
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
    def test_two_panels_a_method(self, num_methods: int) -> None:
        figure = plots.reliability_diagram({f"method {i}": curve(i) for i in range(num_methods)})
        assert len(figure.axes) == 2 * num_methods

    def test_refuses_no_curve_and_an_empty_one(self) -> None:
        with pytest.raises(ValueError, match="curves is empty; expected at least one method"):
            plots.reliability_diagram({})
        empty = curve()._replace(count=torch.zeros(15))
        with pytest.raises(ValueError, match=re.escape("curves['a'] holds no predictions")):
            plots.reliability_diagram({"a": empty})


class TestExampleTask:
    def test_captions_tell_right_from_wrong_by_mark(self) -> None:
        episode = image_task(num_classes=2, num_support=1, num_query=1)
        probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
        found = texts(plots.example_task(episode, probs, class_names=["cat", "dog"], title="Pets"))
        assert {"✓ 90%\ncat", "✗ 70%\ncat", "1 of 2 query images right", "Pets", "cat", "dog"} <= set(found)

    def test_what_is_left_out_is_said(self) -> None:
        episode = image_task(num_classes=4, num_support=6, num_query=9)
        figure = plots.example_task(episode, torch.eye(4).repeat(9, 1), max_classes=3, max_support=2, max_query=5)
        assert "36 of 36 query images right; 15 shown; 3 of 4 classes shown" in texts(figure)
        images = [axes for axes in figure.axes if axes.images]
        assert len(images) == 3 * (2 + 5)

    def test_images_share_one_scale(self) -> None:
        x = torch.tensor([0.0, 3.0, -1.0]).view(3, 1, 1).expand(3, 4, 4)
        episode = Episode(Batch(x[:1], torch.tensor([0])), Batch(x[1:], torch.tensor([0, 0])))
        figure = plots.example_task(episode, torch.tensor([[0.6, 0.4], [0.6, 0.4]]))
        values = [float(np.asarray(axes.images[0].get_array()).max()) for axes in figure.axes if axes.images]
        assert values == [0.25, 1.0, 0.0]

    def test_a_constant_image_is_drawn(self) -> None:
        batch = Batch(torch.ones(2, 4, 4), torch.tensor([0, 1]))
        assert plots.example_task(Episode(batch, batch), torch.eye(2)).axes

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda e, p: plots.example_task(Episode(e.support, Batch(e.query.x, e.query.y.float())), p),
                "episode.query.y has dtype torch.float32; expected class indices: for regression use",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x, e.support.y[:2]), e.query), p),
                "episode.support.y has shape [2]; expected [6], a label for each image",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x[None], e.support.y), e.query), p),
                "episode.support.x has shape [1, 6, 1, 8, 8]; expected [num_examples, height, width] or",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x[:0], e.support.y[:0]), e.query), p),
                "episode.support.x has shape [0, 1, 8, 8]; expected at least one image",
            ),
            (lambda e, p: plots.example_task(e, p[:3]), "probs has shape [3, 3]; expected [12, num_classes]"),
            (lambda e, p: plots.example_task(e, p[:, :2]), "episode has label 2; expected labels below 2"),
            (
                lambda e, p: plots.example_task(e, p, class_names=["a"]),
                "class_names has 1 names; expected 3, the last axis of probs",
            ),
        ],
    )
    def test_bad_input_is_refused(self, call: Callable[[Episode, Tensor], Figure], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(image_task(), torch.full((12, 3), 1 / 3))


class TestExampleRegression:
    def test_the_band_is_the_central_interval_in_the_order_of_x(self) -> None:
        x = torch.tensor([[2.0], [0.0], [1.0]])
        query, support = Batch(x, x**2), Batch(torch.tensor([0.5]), torch.tensor([0.25]))
        figure = plots.example_regression(Episode(support, query), x**2, torch.full((3,), 4.0), x_label="time (s)")
        (axes,) = figure.axes
        mean_line, targets, given = axes.lines
        np.testing.assert_allclose(mean_line.get_xydata(), [[0, 0], [1, 1], [2, 4]])
        np.testing.assert_allclose(targets.get_xydata(), [[2, 4], [0, 0], [1, 1]])
        np.testing.assert_allclose(given.get_xydata(), [[0.5, 0.25]])
        vertices = axes.collections[0].get_paths()[0].vertices
        assert np.asarray(vertices)[:, 1].max() == pytest.approx(4 + 2 * 1.6448536269514722)
        assert axes.get_xlabel() == "time (s)"

    def test_bad_input_is_refused(self) -> None:
        good = Batch(torch.zeros(4, 1), torch.zeros(4, 1))
        plane = Batch(torch.zeros(4, 2), torch.zeros(4, 1))
        ones = torch.ones(4)
        with pytest.raises(ValueError, match=re.escape("episode.support.x has shape [4, 2]; expected [4] or [4, 1]")):
            plots.example_regression(Episode(plane, good), ones, ones)
        with pytest.raises(ValueError, match=re.escape("variance has shape [3]; expected [4] or [4, 1]")):
            plots.example_regression(Episode(good, good), ones, ones[:3])


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
        values = torch.rand(400, generator=generator(), dtype=torch.float64) + 0.5
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


class TestComparison:
    def test_numbers_are_estimates_and_paired_differences(self) -> None:
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

    def test_a_single_run_or_task_is_drawn(self) -> None:
        assert len(plots.comparison(per_task(1)).axes) == 3
        plots.comparison(per_task(2, num_tasks=1))

    def test_an_infinite_value_is_said_in_words(self) -> None:
        bad, good = torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])
        figure = plots.comparison({"a": {"nll": bad}, "b": {"nll": good}, "c": {"nll": bad}})
        assert [text.get_text() for text in figure.axes[0].texts if "±" not in text.get_text()] == ["infinite"] * 2
        assert [text.get_text() for text in figure.axes[1].texts] == ["minus infinite", "undefined"]

    def test_only_common_metrics_are_shown(self) -> None:
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
