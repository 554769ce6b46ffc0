"""Table 1 and Fig. 3 as figures: what is drawn is read back from the artists."""

from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

from ibaml import metrics, plots
from ibaml.experiments.few_shot.calibration import calibration
from ibaml.experiments.few_shot.fig3 import Fig3Result, Fig3Settings
from ibaml.experiments.few_shot.plot import fig3_figure, table1_figure
from ibaml.experiments.few_shot.run import FewShotSettings, RunResult
from ibaml.experiments.few_shot.table1 import Table1Result, Table1Settings
from ibaml.experiments.training import TrainedRun
from ibaml.learner.evaluations import StoredEvaluation
from ibaml.metrics import paired_difference


def made_up(
    settings: FewShotSettings, num_tasks: int = 40, evaluated: int = 9
) -> tuple[tuple[RunResult, ...], dict[str, torch.Tensor], torch.Tensor]:
    """Runs of all methods on the same random tasks, the third of them unfinished."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (num_tasks, 15), generator=generator)
    found: list[RunResult] = []
    probs: dict[str, torch.Tensor] = {}
    for index, (method, recipe) in enumerate(settings.recipes().items()):
        logits = torch.randn(num_tasks, 15, 5, generator=generator, dtype=torch.float64)
        logits.scatter_add_(2, labels[..., None], torch.full((num_tasks, 15, 1), 1.0 + 0.1 * index).double())
        log_probs = (1.5 * logits).log_softmax(-1)
        per_task = {
            "nll": metrics.nll(log_probs, labels),
            "accuracy": metrics.accuracy(log_probs.exp(), labels),
            "ece": metrics.ece(log_probs.exp(), labels),
        }
        report = {name: metrics.estimate(value) for name, value in per_task.items()}
        evaluation = None
        if index < evaluated:
            evaluation = StoredEvaluation({"seed": 0, "num_tasks": num_tasks}, report, per_task, 9, None)
            probs[method] = log_probs.exp()
        steps = recipe.trainer.num_steps - (index == 2)
        found.append(RunResult(method, TrainedRun(recipe, Path("x"), steps, 9, 1.0), ("x86_64 CPU",), evaluation, {}))
    return tuple(found), probs, labels


def table1_result(**arguments: int) -> Table1Result:
    settings = Table1Settings()
    return Table1Result(settings, made_up(settings, **arguments)[0])


def fig3_result(**arguments: int) -> Fig3Result:
    settings = Fig3Settings()
    found, probs, labels = made_up(settings, **arguments)
    reference = probs.get("maml_k5")
    return Fig3Result(settings, found, {name: calibration(value, labels, reference) for name, value in probs.items()})


def test_table1_shows_every_method_and_its_difference():
    result = table1_result()
    figure = table1_figure(*result)
    accuracy, accuracy_change, nll, nll_change = figure.axes
    names = ["MAML, K = 5", "ABML, K = 5", "iBaML, K = 5 *", "iBaML, K = 10", "iBaML, K = 15"]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == names
    assert [label.get_text() for label in accuracy_change.get_yticklabels()] == names[1:]
    for axes, metric, scale in ((accuracy, "accuracy", 100), (nll, "nll", 1)):
        drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "osD^v"]
        assert drawn == pytest.approx([scale * one.evaluation.report[metric].mean for one in result.runs])
    first = result.runs[0].evaluation.per_task["nll"]
    change = paired_difference(result.runs[4].evaluation.per_task["nll"], first)
    text = f"{change.mean:+.3f} ± {change.half_width:.3f}".replace("-", "−")
    assert text in [annotation.get_text() for annotation in nll_change.texts]


def test_the_titles_say_what_it_is_of():
    for figure, heading in (
        (table1_figure(*table1_result()), "Table 1: 5-way 5-shot"),
        (fig3_figure(*fig3_result()), "Fig. 3: calibration, 5-way 1-shot"),
    ):
        title = figure.get_suptitle()
        assert title.startswith(heading)
        assert "Tiny-ImageNet stand-in, laptop scale: not miniImageNet" in title.replace("\n", " ")
        assert title.endswith("* training is not finished")
    finished = table1_result()
    finished = finished._replace(runs=finished.runs[:2])
    assert "not finished" not in table1_figure(*finished).get_suptitle()


def bars(axes: Axes, label: str) -> list[float]:
    (container,) = (container for container in axes.containers if container.get_label() == label)
    return [patch.get_height() for patch in container]


def test_fig3_shows_the_curves_and_the_errors():
    result = fig3_result()
    figure = fig3_figure(*result)
    *panels, ece, mce = figure.axes
    tops, bottoms = panels[::2], panels[1::2]
    assert [axes.get_title() for axes in tops] == ["MAML, K = 5", "ABML, K = 5", "iBaML, K = 5 *"]
    for top, bottom, found in zip(tops, bottoms, result.calibrations.values(), strict=True):
        filled = found.curve.count > 0
        assert bars(top, "accuracy") == pytest.approx(found.curve.accuracy[filled].tolist())
        gap = (found.curve.accuracy - found.curve.confidence)[filled].abs()
        assert bars(top, "gap") == pytest.approx(gap.tolist())
        assert sum(patch.get_height() for patch in bottom.patches) == pytest.approx(1)
    for axes, metric in ((ece, "ece"), (mce, "mce")):
        found = result.calibrations.values()
        assert bars(axes, "mean over tasks") == pytest.approx([one.per_task[metric].mean for one in found])
        assert bars(axes, "all queries pooled") == pytest.approx([one.pooled[metric].mean for one in found])
    (legend,) = figure.legends
    assert legend.get_title().get_text().startswith("40 tasks, 15 equal-width bins of the confidence")


def test_methods_without_an_evaluation_are_left_out():
    figure = table1_figure(*table1_result(evaluated=2))
    assert len(figure.axes[0].get_yticklabels()) == 2
    figure = fig3_figure(*fig3_result(evaluated=1))
    assert len(figure.axes) == 4 and figure.axes[0].get_title() == "MAML, K = 5"


def test_nothing_evaluated_yet(tmp_path):
    for draw, result in ((table1_figure, table1_result(evaluated=0)), (fig3_figure, fig3_result(evaluated=0))):
        figure = draw(*result)
        assert not figure.axes
        assert [text.get_text() for text in figure.texts if "evaluated" in text.get_text()] == [
            "No method has been evaluated yet."
        ]
        plots.save(figure, tmp_path / "figure.png")
