"""FS-Mol: delta-AUPRC, nll and ECE of each method over the number of known molecules."""

import matplotlib as mpl
from matplotlib.figure import Figure

from ibaml.experiments.fsmol.run import DISPLAY_NAMES, FsmolResult
from ibaml.metrics import estimate
from ibaml.plots.style import STYLE, WIDTH, look, new_figure

_PANELS = {
    "delta_auprc": "delta-AUPRC (higher is better)",
    "nll": "nll, nats (lower is better)",
    "ece": "ECE (lower is better)",
}


def fsmol_figure(result: FsmolResult) -> Figure:
    """One panel per metric: means over assays with 95% intervals, a line per method.

    Args:
        result: What ``ibaml.experiments.fsmol.run.run`` returned.

    Returns:
        The figure.
    """
    sizes = list(result.scores)
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 4.6)
        panels = figure.subplots(1, len(_PANELS))
        for axes, (metric, label) in zip(panels, _PANELS.items(), strict=True):
            for place, method in enumerate(result.settings.methods):
                values = [estimate(result.scores[size][method][metric]) for size in sizes]
                # Side by side: intervals on top of one another cannot be read.
                shift = 0.48 * (place - (len(result.settings.methods) - 1) / 2) / len(result.settings.methods)
                axes.errorbar(
                    [position + shift for position in range(len(sizes))],
                    [value.mean for value in values],
                    [value.half_width for value in values],
                    **look(place),
                    linestyle="none",
                    markersize=5,
                    capsize=2,
                    label=DISPLAY_NAMES[method],
                )
            axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axes.set_xlabel("Known molecules")
            axes.set_title(label, fontsize=11)
            axes.grid(axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        what = "validation assays" if result.settings.file is None else result.settings.file.name
        figure.suptitle(f"FS-Mol: {what}, means over assays with 95% intervals")
    return figure
