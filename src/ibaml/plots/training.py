"""Training curves: what the metrics file of a run says, against the meta-iteration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ibaml.plots.style import BLUE, STYLE, VERMILION, WIDTH, Array, new_figure


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


_VALIDATION = "validation tasks"


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
    panels: list[tuple[_Panel, tuple[Array, Array], tuple[Array, Array]]] = []
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
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH if num_columns == 2 else 6.0, 0.9 + 2.7 * num_rows)
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
        tempered = any(row.get("validation_temperature", 1.0) != 1 for row in history)
        for axes in drawn:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                # Training losses come without the output temperature, so that the two are no measure of each other.
                is_tempered = tempered and label == _VALIDATION
                handles.setdefault(f"{label}, with output temperature" if is_tempered else label, handle)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=num_columns + 1)
    return figure


def _series(history: Sequence[Mapping[str, float]], names: tuple[str, ...], panel: _Panel) -> tuple[Array, Array]:
    """Returns steps and values of the first of ``names`` that has any value fit to be drawn."""
    for name in names:
        pairs = [(float(row["step"]), float(row[name])) for row in history if name in row]
        pairs = [(s, v) for s, v in pairs if math.isfinite(v) and (v > 0 or not panel.logarithmic)]
        if pairs:
            array = np.array(sorted(pairs), dtype=np.float64)
            return array[:, 0], array[:, 1] * (100 if panel.percent else 1)
    return np.empty(0), np.empty(0)


def _running_mean(values: Array, window: int) -> Array:
    """Centred mean over ``window`` (odd) values, over those that exist at the two ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _draw_training(axes: Axes, panel: _Panel, training: tuple[Array, Array], validation: tuple[Array, Array]) -> None:
    steps, values = training
    if len(steps):
        window = 2 * (len(steps) // 80) + 1
        smooth = np.exp(_running_mean(np.log(values), window)) if panel.logarithmic else _running_mean(values, window)
        if window > 1:
            axes.plot(steps, values, color=BLUE, lw=0.7, alpha=0.25, label="training tasks, each value")
            label = "training tasks, running mean"
        else:
            label = "training tasks"
        axes.plot(steps, smooth, color=BLUE, lw=2, marker="." if len(steps) < 30 else "", label=label)
    if len(validation[0]):
        axes.plot(*validation, "D--", color=VERMILION, ms=5, lw=1, mec="white", mew=0.6, label=_VALIDATION)
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
        if high < 100 * low:
            # Between few decades matplotlib labels every minor tick, as 2 x 10^-1 and the like.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
