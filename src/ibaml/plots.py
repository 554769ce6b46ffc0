"""Figures: reliability diagrams, example tasks, training curves, comparisons of runs.

Every function builds a ``matplotlib.figure.Figure`` without pyplot, so that nothing opens a window, no figure
stays in a global list, and threads do not meet. Colours are those of Okabe and Ito (2008), told apart by readers with
any common colour vision; no information is in the colour alone. Text is sized to be read at 900 pixels of width.
"""

# matplotlib leaves the keyword arguments of nearly every method without a type.
# pyright: reportUnknownMemberType=false

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ibaml.metrics import Estimate, ReliabilityCurve, central_interval, estimate, paired_difference
from ibaml.types import Episode, Tensor

_BLACK, _GREY, _PALE = "#1a1a1a", "#6b6b6b", "#d9d9d9"
_BLUE, _VERMILION, _GREEN, _SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
_COLORS = (_BLUE, _VERMILION, _GREEN, "#CC79A7", "#E69F00", _SKY, _BLACK)
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_DPI = 150
_WIDTH = 9.0
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _BLACK,
    "ytick.labelcolor": _BLACK,
    "grid.color": _PALE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}

_Array = npt.NDArray[np.float64]


class _Panel(NamedTuple):
    """One small multiple of the training curves; of several names for one quantity the first that is present counts."""

    label: str
    training: tuple[str, ...]
    validation: tuple[str, ...]
    logarithmic: bool = False
    percent: bool = False


_PANELS = (
    _Panel("Loss (nats per example)", ("outer_loss", "loss"), ("validation_nll", "validation_loss")),
    _Panel("Accuracy (%)", ("accuracy",), ("validation_accuracy",), percent=True),
    _Panel("Squared error (target unit squared)", ("mse",), ("validation_mse",), logarithmic=True),
    _Panel("Inner gradient norm", ("inner_grad_norm",), (), logarithmic=True),
    _Panel("Linear residual, relative", ("linear_residual",), (), logarithmic=True),
)


class _Metric(NamedTuple):
    """How the comparison shows one metric and its differences."""

    label: str
    scale: float
    unit: str
    unit_of_difference: str
    spec: str


_COMPARED = {
    "accuracy": _Metric("Accuracy", 100.0, "%, higher is better", "% points, higher is better", ".2f"),
    "nll": _Metric("Negative log-likelihood", 1.0, "nats, lower is better", "nats, lower is better", ".3f"),
    "ece": _Metric("Calibration error (ECE)", 100.0, "%, lower is better", "% points, lower is better", ".2f"),
}


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG at 150 dots per inch, atomically: a reader sees the old file or the new, never a part.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Figure(figsize=(1, 1)), f"{folder}/empty.png").name
        'empty.png'

    Args:
        figure: The figure.
        path: Where to; must end in ``.png``. Missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError: If the path does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path is {str(path)!r}; expected a name that ends in .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], *, title: str = "Are the confidences right?") -> Figure:
    """Accuracy against confidence for each method, the gap to the diagonal shaded, the number of predictions below.

    Points below the diagonal are overconfident. ECE and MCE are those of the pooled predictions.

    Examples:
        >>> curve = ReliabilityCurve(
        ...     torch.tensor([0.0, 0.5, 1.0]),
        ...     torch.tensor([0.4, 0.8]),
        ...     torch.tensor([0.5, 0.7]),
        ...     torch.tensor([3.0, 9.0]),
        ... )
        >>> [axes.get_ylabel() for axes in reliability_diagram({"iBaML": curve}).axes]
        ['Accuracy', 'Predictions']

    Args:
        curves: Method name to its curve, from ``ibaml.metrics.reliability_curve``.
        title: Title of the figure.

    Returns:
        The figure, up to three methods in a row.

    Raises:
        ValueError: If there is no curve or one holds no predictions.
    """
    if not curves:
        raise ValueError("curves is empty; expected at least one method.")
    for name, curve in curves.items():
        if not curve.count.sum() > 0:
            raise ValueError(f"curves[{name!r}] holds no predictions; expected a positive count in some bin.")
    num_columns = min(len(curves), 3)
    num_rows = math.ceil(len(curves) / num_columns)
    highest = max(float(curve.count.max()) for curve in curves.values())
    with mpl.rc_context(_STYLE):
        # A lone panel need not be as wide as three.
        width = {1: 5.4, 2: 7.6}.get(num_columns, _WIDTH)
        figure = _figure(width, 0.9 + num_rows * (width / num_columns + 1.3))
        figure.suptitle(title)
        grid = figure.add_gridspec(2 * num_rows, num_columns, height_ratios=(3, 1) * num_rows)
        top = None
        for index, (name, curve) in enumerate(curves.items()):
            row, column = divmod(index, num_columns)
            top = figure.add_subplot(grid[2 * row, column])
            bottom = figure.add_subplot(grid[2 * row + 1, column], sharex=top)
            _draw_reliability(top, bottom, curve, highest)
            top.set_title(name)
            if column == 0:
                top.set_ylabel("Accuracy")
                bottom.set_ylabel("Predictions")
            else:
                top.tick_params(labelleft=False)
                bottom.tick_params(labelleft=False)
        figure.align_ylabels()
        if top is not None:
            figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def example_task(
    episode: Episode,
    probs: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "One task",
    max_classes: int = 8,
    max_support: int = 5,
    max_query: int = 6,
) -> Figure:
    """One image-classification task: support images by class, query images with their predictions.

    Each row is a class. A query image carries a tick or a cross, the confidence, and the predicted class.

    Examples:
        >>> from ibaml.types import Batch
        >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> figure = example_task(Episode(batch, batch), torch.tensor([[0.9, 0.1], [0.8, 0.2]]))

    Args:
        episode: A single task; ``x`` of shape ``[num_examples, height, width]`` or ``[num_examples, channels, height,
            width]`` with 1 or 3 channels, on any scale; ``y`` class indices of shape ``[num_examples]``.
        probs: Predictive probabilities at the query images, shape ``[num_query, num_classes]``.
        class_names: A name for each class; by default the numbers from 0.
        title: Title of the figure.
        max_classes: Show at most so many classes, the first.
        max_support: Show at most so many support images of a class.
        max_query: Show at most so many query images of a class.

    Returns:
        The figure. What was left out for space is said below the title.

    Raises:
        ValueError: If a shape does not fit or the targets are no class indices.
    """
    support_x, query_x = _images("episode.support.x", episode.support.x), _images("episode.query.x", episode.query.x)
    support_y, query_y = episode.support.y.detach().cpu(), episode.query.y.detach().cpu()
    for name, y, x in (("support", support_y, support_x), ("query", query_y, query_x)):
        if y.is_floating_point():
            raise ValueError(
                f"episode.{name}.y has dtype {y.dtype}; expected class indices: for regression use example_regression."
            )
        if y.shape != (len(x),):
            raise ValueError(
                f"episode.{name}.y has shape {list(y.shape)}; expected [{len(x)}], a label for each image of one task."
            )
    if probs.ndim != 2 or len(probs) != len(query_y):
        raise ValueError(f"probs has shape {list(probs.shape)}; expected [{len(query_y)}, num_classes].")
    num_classes = probs.shape[1]
    highest = int(torch.cat([support_y, query_y]).max())
    if highest >= num_classes:
        raise ValueError(f"episode has label {highest}; expected labels below {num_classes}, the last axis of probs.")
    names = [str(index) for index in range(num_classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names; expected {num_classes}, the last axis of probs.")

    low = min(float(support_x.min()), float(query_x.min()))
    span = max(float(support_x.max()), float(query_x.max())) - low or 1.0
    confidence, prediction = probs.detach().cpu().to(torch.float64).max(-1)
    classes = range(min(num_classes, max_classes))
    support_of: dict[int, list[int]] = {c: (support_y == c).nonzero().flatten().tolist() for c in classes}
    query_of: dict[int, list[int]] = {c: (query_y == c).nonzero().flatten().tolist() for c in classes}
    num_support = max(1, min(max_support, max(len(indices) for indices in support_of.values())))
    num_query = max(1, min(max_query, max(len(indices) for indices in query_of.values())))

    correct = int((prediction == query_y).sum())
    summary = f"{correct} of {len(query_y)} query images right"
    shown = sum(min(len(indices), num_query) for indices in query_of.values())
    if shown < len(query_y):
        summary += f"; {shown} shown"
    if len(classes) < num_classes:
        summary += f"; {len(classes)} of {num_classes} classes shown"

    with mpl.rc_context(_STYLE):
        # Row labels, support images, a gap, query images; in units of one query image.
        label_width = 1.2 if max(len(name) for name in names) > 4 else 0.55
        widths = [label_width, *[0.8] * num_support, 0.25, *[1.0] * num_query]
        spacing = 0.1
        total = sum(widths) * (1 + spacing * (len(widths) - 1) / len(widths))
        width = min(max(1.1 * total, 5.5), _WIDTH)
        unit = 0.98 * width / total
        above, below, between = 1.05, 0.85, 0.5
        height = above + len(classes) * unit + (len(classes) - 1) * between + below
        figure = Figure(figsize=(width, height), dpi=_DPI)
        grid = figure.add_gridspec(
            len(classes),
            len(widths),
            width_ratios=widths,
            left=0.01,
            right=0.99,
            bottom=below / height,
            top=1 - above / height,
            wspace=spacing,
            hspace=between / unit,
        )
        figure.text(0.5, 1 - 0.22 / height, title, ha="center", va="center", size=14, weight="bold")
        figure.text(0.5, 1 - 0.5 / height, summary, ha="center", va="center", color=_GREY)
        legend = "✓ right or ✗ wrong, with the confidence and the predicted class"
        figure.text(0.5, 0.2 / height, legend, ha="center", va="center", size=10, color=_GREY)
        for column, heading in ((1, "Support"), (2 + num_support, "Query")):
            left = grid[0, column].get_position(figure).x0
            figure.text(left, 1 - (above - 0.1) / height, heading, size=12, weight="bold")
        # About 0.095 inches a letter.
        name_length, caption_length = int(label_width * unit / 0.095), max(3, int(unit / 0.095))
        for row, label in enumerate(classes):
            axes = figure.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(
                0.95,
                0.5,
                _shorten(names[label], name_length),
                ha="right",
                va="center",
                transform=axes.transAxes,
                size=10,
            )
            for column, index in enumerate(support_of[label][:num_support]):
                axes = figure.add_subplot(grid[row, 1 + column])
                _draw_image(axes, (support_x[index] - low) / span, _GREY, 0.8)
            for column, index in enumerate(query_of[label][:num_query]):
                axes = figure.add_subplot(grid[row, 2 + num_support + column])
                right = int(prediction[index]) == label
                color = _BLUE if right else _VERMILION
                _draw_image(axes, (query_x[index] - low) / span, color, 2.5)
                caption = f"{'✓' if right else '✗'} {float(confidence[index]):.0%}\n"
                caption += _shorten(names[int(prediction[index])], caption_length)
                axes.set_xlabel(caption, color=color, size=10, weight="normal" if right else "bold", labelpad=3)
    return figure


def example_regression(
    episode: Episode,
    mean: Tensor,
    variance: Tensor,
    *,
    title: str = "One task",
    x_label: str = "x",
    y_label: str = "y",
) -> Figure:
    """One regression task of one input and one output: support and query points, predictive mean and 90% band.

    The band is ``mean +- 1.645 sqrt(variance)``, that of a Gaussian prediction.

    Examples:
        >>> from ibaml.types import Batch
        >>> batch = Batch(torch.linspace(-1, 1, 5)[:, None], torch.zeros(5, 1))
        >>> figure = example_regression(Episode(batch, batch), torch.zeros(5, 1), torch.ones(5, 1))

    Args:
        episode: A single task; ``x`` of shape ``[num_examples]`` or ``[num_examples, 1]``, ``y`` the same.
        mean: Predictive mean at the query inputs, as many values as query examples.
        variance: Total predictive variance there, in the target's unit squared.
        title: Title of the figure.
        x_label: Label of the input axis, with its unit.
        y_label: Label of the target axis, with its unit.

    Returns:
        The figure.

    Raises:
        ValueError: If the inputs or targets are not one-dimensional, or the sizes differ.
    """
    arrays = {
        "episode.support.x": _column(episode.support.x),
        "episode.support.y": _column(episode.support.y),
        "episode.query.x": _column(episode.query.x),
        "episode.query.y": _column(episode.query.y),
        "mean": _column(mean),
        "variance": _column(variance),
    }
    sizes = {"support": episode.support.x.shape[0], "query": episode.query.x.shape[0]}
    for name, array in arrays.items():
        num_examples = sizes["support" if ".support." in name else "query"]
        if array is None or len(array) != num_examples:
            given = {"mean": mean, "variance": variance}.get(name)
            if given is None:
                given = getattr(getattr(episode, name.split(".")[1]), name[-1])
            raise ValueError(
                f"{name} has shape {list(given.shape)}; expected [{num_examples}] or [{num_examples}, 1]: "
                "one task, one input, one output."
            )
    support_x, support_y, query_x, query_y, center, spread = (
        torch.empty(0) if array is None else array for array in arrays.values()
    )
    order = query_x.argsort()
    lower, upper = central_interval(center[order], spread[order], 0.9)
    with mpl.rc_context(_STYLE):
        figure = _figure(8.0, 4.8)
        axes = figure.add_subplot()
        axes.fill_between(
            query_x[order].numpy(), lower.numpy(), upper.numpy(), color=_SKY, alpha=0.35, lw=0, label="90% interval"
        )
        axes.plot(query_x[order].numpy(), center[order].numpy(), color=_BLUE, lw=2, label="predictive mean")
        axes.plot(
            query_x.numpy(), query_y.numpy(), "o", ms=4, mfc="white", mec=_GREY, mew=1, label="query targets", zorder=3
        )
        axes.plot(
            support_x.numpy(), support_y.numpy(), "X", ms=10, mfc=_VERMILION, mec="white", label="support", zorder=4
        )
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.02, y=0.08)
        figure.suptitle(title)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def training_curves(history: Sequence[Mapping[str, float]], *, title: str = "Training") -> Figure:
    """Loss, accuracy or squared error, inner gradient norm and linear residual against the meta-iteration.

    Raw values are faint, a centred running mean over a fortieth of them is drawn strong (on a logarithmic axis the
    mean of the logarithms), validation values are marked points. Only quantities that are present get a panel.

    Examples:
        >>> figure = training_curves([{"step": 0, "loss": 1.6}, {"step": 10, "loss": 1.2, "validation_nll": 1.3}])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Loss (nats per example)']

    Args:
        history: Rows of a metrics file, each with ``step`` and any of ``loss`` (or ``outer_loss``), ``accuracy`` (in
            ``[0, 1]``), ``mse``, ``inner_grad_norm``, ``linear_residual``, ``validation_nll`` (or
            ``validation_loss``), ``validation_accuracy``, ``validation_mse``. Missing keys and nan are skipped, other
            keys ignored; on a logarithmic axis so are values that are not positive.
        title: Title of the figure.

    Returns:
        The figure, two panels in a row.

    Raises:
        ValueError: If a row has no ``step``, or no row holds a quantity that can be shown.
    """
    for index, row in enumerate(history):
        if "step" not in row:
            raise ValueError(f"history[{index}] has the keys {sorted(row)}; expected 'step' among them.")
    panels: list[tuple[_Panel, tuple[_Array, _Array], tuple[_Array, _Array]]] = []
    for panel in _PANELS:
        training = _series(history, panel.training, panel)
        validation = _series(history, panel.validation, panel)
        if len(training[0]) or len(validation[0]):
            panels.append((panel, training, validation))
    if not panels:
        expected = [name for panel in _PANELS for name in (*panel.training, *panel.validation)]
        found = sorted({name for row in history for name in row})
        raise ValueError(f"history holds {found}; expected finite values of some of {expected}.")
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    with mpl.rc_context(_STYLE):
        figure = _figure(_WIDTH if num_columns == 2 else 6.0, 0.9 + 2.7 * num_rows)
        figure.suptitle(title)
        shared: Axes | None = None
        drawn: list[Axes] = []
        for index, (panel, training, validation) in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, index + 1, sharex=shared)
            shared = shared or axes
            drawn.append(axes)
            _draw_training(axes, panel, training, validation)
            if index + num_columns >= len(panels):
                axes.set_xlabel("Meta-iteration")
        handles: dict[str, Any] = {}
        for axes in drawn:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=num_columns + 1)
    return figure


def comparison(per_task: Mapping[str, Mapping[str, Tensor]], *, title: str = "Comparison of runs") -> Figure:
    """Accuracy, nll and ECE of each run with 95% intervals, and the paired differences to the first run.

    A difference is filled when its interval excludes zero. Differences pair the runs task by task, so all runs must
    have been evaluated on the same tasks in the same order.

    Examples:
        >>> runs = {"MAML": {"accuracy": torch.tensor([0.6, 0.7])}, "iBaML": {"accuracy": torch.tensor([0.7, 0.7])}}
        >>> len(comparison(runs).axes)
        2

    Args:
        per_task: Run name to metric name (``accuracy``, ``nll``, ``ece``; others are ignored) to per-task values of
            shape ``[num_tasks]``, as the functions of ``ibaml.metrics`` return them.
        title: Title of the figure.

    Returns:
        The figure; the row of differences is missing when there is a single run.

    Raises:
        ValueError: If no metric is common to all runs, or the numbers of tasks differ.
    """
    runs = list(per_task)
    shown = [name for name in _COMPARED if runs and all(name in per_task[run] for run in runs)]
    if not shown:
        raise ValueError(
            f"per_task holds { {run: sorted(values) for run, values in per_task.items()} }; "
            f"expected every run to hold at least one same metric of {list(_COMPARED)}."
        )
    for name in shown:
        counts = {run: len(per_task[run][name]) for run in runs}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"per_task has {counts} values of {name}; expected the same number for each run: "
                "evaluate the runs on the same tasks."
            )
    num_rows = 2 if len(runs) > 1 else 1
    num_tasks = len(per_task[runs[0]][shown[0]])
    with mpl.rc_context(_STYLE):
        # Proportional to the number of rows plus the room above the first.
        heights = [len(runs) + 0.3, len(runs) - 0.7][:num_rows]
        figure = _figure(max(3.0 * len(shown), 6.6), 1.0 + sum(1.0 + 0.48 * height for height in heights))
        grid = figure.add_gridspec(num_rows, len(shown), height_ratios=heights)
        figure.suptitle(title)
        for column, name in enumerate(shown):
            metric = _COMPARED[name]
            axes = figure.add_subplot(grid[0, column])
            values = [estimate(per_task[run][name]) for run in runs]
            _draw_estimates(axes, runs, values, metric, named=column == 0, difference=False)
            axes.set_title(metric.label)
            if num_rows == 2:
                below = figure.add_subplot(grid[1, column])
                changes = [_difference(per_task[run][name], per_task[runs[0]][name]) for run in runs[1:]]
                _draw_estimates(below, runs[1:], changes, metric, named=column == 0, difference=True)
                below.set_title(f"Difference to {_shorten(runs[0], 14)}", size=11, weight="normal")
        note = f"Means over {num_tasks:,} tasks with 95% intervals."
        if num_rows == 2:
            note += " Filled difference: interval excludes zero."
        figure.supxlabel(note, size=10, color=_GREY)
    return figure


def _figure(width: float, height: float) -> Figure:
    # Slightly wider margins than the default, so that no label touches the edge or its neighbour.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _draw_reliability(top: Axes, bottom: Axes, curve: ReliabilityCurve, highest: float) -> None:
    edges = curve.bin_edges.detach().cpu().numpy()
    count = curve.count.detach().cpu().numpy()
    filled = count > 0
    confidence = curve.confidence.detach().cpu().numpy()[filled]
    accuracy = curve.accuracy.detach().cpu().numpy()[filled]
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    base = np.minimum(accuracy, confidence)
    top.bar(left, base, width, align="edge", color=_BLUE, alpha=0.25, edgecolor="white", lw=0.8)
    top.bar(
        left,
        np.abs(confidence - accuracy),
        width,
        bottom=base,
        align="edge",
        facecolor=(*matplotlib.colors.to_rgb(_VERMILION), 0.18),
        edgecolor=_VERMILION,
        hatch="////",
        lw=0.8,
        label="gap to the mean confidence",
    )
    top.plot([0, 1], [0, 1], "--", color=_GREY, lw=1.2, label="calibrated")
    # Accuracies of exactly 0 and 1 are drawn whole.
    top.plot(confidence, accuracy, "o-", color=_BLUE, ms=5, lw=1.5, clip_on=False, zorder=3, label="accuracy")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.tick_params(labelbottom=False)
    # Above the diagonal on the left is where a reliability diagram is emptiest.
    top.text(
        0.03,
        0.97,
        f"ECE {curve.ece:.3f}\nMCE {curve.mce:.3f}",
        transform=top.transAxes,
        va="top",
        zorder=4,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )
    bottom.bar(edges[:-1], count, np.diff(edges), align="edge", color=_GREY, edgecolor="white", lw=0.8)
    bottom.set(xlabel="Confidence", ylim=(0, 1.08 * highest))
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])


def _images(name: str, x: Tensor) -> Tensor:
    """Returns images as ``[num_examples, height, width]`` or ``[num_examples, height, width, 3]``, float64."""
    shape = list(x.shape)
    x = x.detach().cpu().to(torch.float64)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        x = x[:, 0] if x.shape[1] == 1 else x.permute(0, 2, 3, 1)
    elif x.ndim != 3:
        raise ValueError(
            f"{name} has shape {shape}; expected [num_examples, height, width] or "
            "[num_examples, 1 or 3, height, width], the images of one task."
        )
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {shape}; expected at least one image.")
    return x


def _column(values: Tensor) -> Tensor | None:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    return values.detach().cpu().to(torch.float64) if values.ndim == 1 else None


def _draw_image(axes: Axes, image: Tensor, color: str, width: float) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _series(history: Sequence[Mapping[str, float]], names: tuple[str, ...], panel: _Panel) -> tuple[_Array, _Array]:
    """Returns steps and values of the first of ``names`` that has any value fit to be drawn."""
    for name in names:
        pairs = [(float(row["step"]), float(row[name])) for row in history if name in row]
        pairs = [(s, v) for s, v in pairs if math.isfinite(v) and (v > 0 or not panel.logarithmic)]
        if pairs:
            array = np.array(sorted(pairs), dtype=np.float64)
            return array[:, 0], array[:, 1] * (100 if panel.percent else 1)
    return np.empty(0), np.empty(0)


def _running_mean(values: _Array, window: int) -> _Array:
    """Centred mean over ``window`` (odd) values, over those that exist at the two ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _draw_training(
    axes: Axes, panel: _Panel, training: tuple[_Array, _Array], validation: tuple[_Array, _Array]
) -> None:
    steps, values = training
    if len(steps):
        window = 2 * (len(steps) // 80) + 1
        smooth = np.exp(_running_mean(np.log(values), window)) if panel.logarithmic else _running_mean(values, window)
        if window > 1:
            axes.plot(steps, values, color=_BLUE, lw=0.7, alpha=0.25, label="training tasks, each value")
            label = "training tasks, running mean"
        else:
            label = "training tasks"
        axes.plot(steps, smooth, color=_BLUE, lw=2, marker="." if len(steps) < 30 else "", label=label)
    if len(validation[0]):
        axes.plot(*validation, "D--", color=_VERMILION, ms=5, lw=1, mec="white", mew=0.6, label="validation tasks")
    axes.set_title(panel.label, loc="left", size=11)
    axes.grid(axis="y")
    if panel.logarithmic:
        axes.set_yscale("log")
        everything = np.concatenate([values, validation[1]])
        low, high = float(everything.min()), float(everything.max())
        if high < 3 * low:
            # Nearly constant: rounding would fill the axis, which would then have no decade to label.
            center = math.sqrt(low * high)
            axes.set_ylim(center / 4, center * 4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _difference(values: Tensor, reference: Tensor) -> Estimate:
    if (values.isinf() & reference.isinf()).any():
        # Infinity minus infinity on some task.
        return Estimate(math.nan, math.nan, len(values))
    return paired_difference(values, reference)


def _draw_estimates(
    axes: Axes, runs: Sequence[str], estimates: Sequence[Estimate], metric: _Metric, *, named: bool, difference: bool
) -> None:
    # The first run keeps its colour in the upper row, so the differences start at the second.
    offset = 1 if difference else 0
    if difference:
        axes.axvline(0.0, color=_GREY, lw=1.2, ls="--")
    for row, value in enumerate(estimates):
        if not math.isfinite(value.mean):
            text = "undefined" if math.isnan(value.mean) else "infinite" if value.mean > 0 else "minus infinite"
            axes.text(0.03, row, text, transform=axes.get_yaxis_transform(), va="center", color=_GREY)
            continue
        mean, half_width = metric.scale * value.mean, metric.scale * value.half_width
        color, marker = _COLORS[(row + offset) % len(_COLORS)], _MARKERS[(row + offset) % len(_MARKERS)]
        hollow = difference and not abs(value.mean) > value.half_width
        axes.errorbar(
            mean,
            row,
            xerr=half_width if math.isfinite(half_width) else None,
            fmt=marker,
            ms=7,
            color=color,
            mfc="white" if hollow else color,
            mew=1.6,
            capsize=3,
            lw=1.8,
        )
        text = f"{mean:{'+' if difference else ''}{metric.spec}} ± {half_width:{metric.spec}}".replace("-", "−")
        axes.annotate(
            text,
            (mean, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=9.5,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_ylim(len(estimates) - 0.5, -0.8)
    axes.set_yticks(range(len(runs)), [_shorten(run, 16) for run in runs] if named else [""] * len(runs))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    # Room for the numbers, which are wider than a short interval.
    axes.margins(x=0.35)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel(metric.unit_of_difference if difference else metric.unit)
