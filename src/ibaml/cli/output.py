"""What commands print: results on standard output, all else on standard error."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from ibaml.baselines import BaselineComparison
from ibaml.learner.compare import Comparison
from ibaml.metrics import Estimate
from ibaml.train.progress import say

console = Console(stderr=True)
"""Where commands say what they do."""


def print_comparison(comparison: Comparison | BaselineComparison) -> None:
    """Prints a comparison, of baselines in parts that fit a terminal."""
    output = Console()
    output.print(f"{comparison.num_tasks} paired test tasks; intervals are 95%", soft_wrap=True, markup=False)
    whole = [[comparison.header, *comparison.rows]]
    for header, *rows in comparison.printed() if isinstance(comparison, BaselineComparison) else whole:
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        output.print(table)
        output.print()


def as_table(report: Mapping[str, Estimate]) -> Table:
    """Returns metrics with their intervals as a table."""
    table = Table("metric", "mean", "95% interval", box=None, pad_edge=False)
    for name, value in report.items():
        table.add_row(name, f"{value.mean:.4f}", f"+- {value.half_width:.4f}")
    return table


def tell(text: str) -> None:
    """Says something to whoever started the command."""
    say(console, text)


def escape(text: str) -> str:
    """Returns a text that rich prints as it is."""
    return text.replace("[", r"\[")
