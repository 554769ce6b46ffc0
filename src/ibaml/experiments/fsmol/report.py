"""What the study of molecules says: a table per support size, and what training took."""

from collections.abc import Mapping

from ibaml.experiments.fsmol.run import DISPLAY_NAMES, FsmolResult, FsmolSettings, run
from ibaml.experiments.report import Experiment, Place, Report, interval_columns, markdown_table
from ibaml.metrics import estimate, paired_difference
from ibaml.types import Tensor


def report(settings: FsmolSettings, place: Place) -> Report:
    """Trains and predicts with all methods and returns what was found in words, tables and a picture."""
    from ibaml.experiments.fsmol.plot import fsmol_figure

    result = run(settings, place)
    tables = {"fsmol": rows(result), "assays": assay_rows(result)}
    return Report(summary(result), tables, {"fsmol": fsmol_figure(result)})


def rows(result: FsmolResult) -> list[dict[str, object]]:
    """Returns every mean with its 95% interval over assays and the paired difference to the first method."""
    found: list[dict[str, object]] = []
    first = result.settings.methods[0]
    for size, by_method in result.scores.items():
        for method, values in by_method.items():
            row: dict[str, object] = {"support": size, "method": method, "num_assays": len(result.assays[size])}
            for metric, value in values.items():
                difference = paired_difference(value, by_method[first][metric])
                row |= interval_columns(metric, estimate(value))
                row |= {f"{metric}_difference": difference.mean, f"{metric}_half_width": difference.half_width}
            found.append(row)
    return found


def assay_rows(result: FsmolResult) -> list[dict[str, object]]:
    """Returns the values of every assay, means over draws."""
    found: list[dict[str, object]] = []
    for size, by_method in result.scores.items():
        for index, name in enumerate(result.assays[size]):
            for method, values in by_method.items():
                row: dict[str, object] = {"support": size, "assay": name, "method": method}
                found.append(row | {metric: float(value[index]) for metric, value in values.items()})
    return found


def summary(result: FsmolResult) -> str:
    """Returns what was found, as Markdown: a table per support size, and what it took."""
    settings = result.settings
    what = (
        "FS-Mol's validation assays" if settings.file is None else f"split {settings.split!r} of {settings.file.name}"
    )
    lines = [
        f"# Activity of molecules: {what}",
        "",
        f"Means over assays of the means over {settings.num_draws} random support sets, the same for every method; +- "
        f"is a 95% interval over assays. In brackets: the paired difference to {_name(settings.methods[0])}.",
    ]
    for size, by_method in result.scores.items():
        lines += ["", f"## {size} molecules known ({len(result.assays[size])} assays)", ""]
        lines += _table(by_method, settings.methods[0])
        if result.seen is not None:
            lines += _by_novelty(by_method, result.seen[size])
    lines += ["", "## Training", ""]
    lines += markdown_table(
        ["", "meta-steps", "chosen", "minutes"],
        [
            [_name(one.recipe.name), one.progress, f"{one.best_step:,}", f"{one.seconds / 60:.1f}"]
            for one in result.trained
        ],
    )
    return "\n".join(lines) + "\n"


def _name(method: str) -> str:
    return DISPLAY_NAMES.get(method, method)


def _table(by_method: Mapping[str, Mapping[str, Tensor]], first: str) -> list[str]:
    def cell(method: str, metric: str, value: Tensor) -> str:
        difference = paired_difference(value, by_method[first][metric])
        return f"{estimate(value)}" + ("" if method == first else f" ({difference:+.3f})")

    return markdown_table(
        ["", "delta-AUPRC", "nll", "ECE"],
        [
            [_name(method), *(cell(method, metric, value) for metric, value in values.items())]
            for method, values in by_method.items()
        ],
    )


def _by_novelty(by_method: Mapping[str, Mapping[str, Tensor]], seen: Tensor) -> list[str]:
    """Splits delta-AUPRC by whether training assays hold nearly all of an assay's molecules."""
    known = seen > 0.95
    if not 1 < int(known.sum()) < len(known) - 1:
        return []
    heads = [f"molecules in training assays ({int(known.sum())} assays)", f"mostly not ({int((~known).sum())} assays)"]
    found = {_name(method): values["delta_auprc"] for method, values in by_method.items()}
    return [
        "",
        "delta-AUPRC of assays whose molecules other assays of the training set have, and of those with new ones:",
        "",
        *markdown_table(
            ["", *heads],
            [[name, f"{estimate(value[known])}", f"{estimate(value[~known])}"] for name, value in found.items()],
        ),
    ]


FSMOL = Experiment(
    settings=FsmolSettings,
    report=report,
    description="Activity of molecules, FS-Mol or your own assay file. Resumable.",
    trains=True,
)
