"""Measures that memory does not depend on inner steps and is linear in weights: ``python -m benchmarks.memory --help``.

Two tables: peak memory and time of the meta-gradient of Conv4 at two numbers of inner steps, and peak memory of a
multilayer perceptron over its number of weights, in vectors of that length.
"""

import os

# The profiler that watches memory logs two lines per use; torch reads this when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import dataclasses  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import date  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import nn  # noqa: E402

from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise, make_algorithm  # noqa: E402
from ibaml.algorithms.model import Model, build_model  # noqa: E402
from ibaml.experiments.fig2.cost import HypergradientProblem, peak_bytes_of  # noqa: E402
from ibaml.learner.folder import write_text  # noqa: E402
from ibaml.likelihoods import Categorical  # noqa: E402
from ibaml.networks import Conv4  # noqa: E402
from ibaml.solvers.inner import GradientDescent  # noqa: E402
from ibaml.solvers.linear import CG  # noqa: E402
from ibaml.train.step import HypergradientStep  # noqa: E402
from ibaml.types import Batch, Episode  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure.

    Attributes:
        few_steps: The smaller number of inner steps.
        many_steps: The larger one.
        num_repeats: Interleaved repeats of each time.
        widths: Widths w of the perceptrons, which have about w^2 weights.
        output: The result file; None: benchmarks/results/DATE-memory.md.
    """

    few_steps: int = 5
    many_steps: int = 100
    num_repeats: int = 7
    widths: tuple[int, ...] = (1_000, 3_162, 10_000)
    output: Path | None = None


def main(arguments: Arguments) -> None:
    """Measures and writes the result file."""
    lines = [
        f"# Memory of meta-gradients, {date.today().isoformat()}",
        "",
        f"`python -m benchmarks.memory {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}, float32. Memory is "
        "the peak of what torch's allocator handed out, above the level before.",
        "",
        *_flat_in_steps(arguments),
        "",
        *_linear_in_weights(arguments),
        "",
    ]
    text = "\n".join(lines)
    write_text(arguments.output or _ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-memory.md", text)
    print(text)


def _flat_in_steps(arguments: Arguments) -> list[str]:
    few, many = arguments.few_steps, arguments.many_steps
    lines = [
        f"## {few} and {many} inner steps",
        "",
        "Conv4-32, 28 x 28 x 3, 5-way 1-shot, 15 query images a class, L = 5, one weight sample. *Whole*: the fast "
        "meta-gradient with its inner steps. *After the inner steps*: only what follows them, by the plain path, "
        "medians of interleaved repeats.",
        "",
        f"| | peak MB, whole, K = {few} | K = {many} | change | ms after the inner steps, K = {few} | K = {many} "
        "| change of medians | change of shortest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("imaml", "ibaml"):
        problems = [_conv_problem(name, steps) for steps in (few, many)]
        peaks = [peak_bytes_of(_whole(*problem), _CPU) / 1e6 for problem in problems]
        seconds: list[list[float]] = [[], []]
        for _ in range(arguments.num_repeats):
            for times, problem in zip(seconds, problems, strict=True):
                times.append(_seconds_after_inner_steps(*problem))
        medians = [1e3 * statistics.median(times) for times in seconds]
        shortest = [min(times) for times in seconds]
        lines.append(
            f"| {name} | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[1] / peaks[0] - 1:+.2%} | {medians[0]:.1f} | "
            f"{medians[1]:.1f} | {medians[1] / medians[0] - 1:+.1%} | {shortest[1] / shortest[0] - 1:+.1%} |"
        )
        _say(lines[-1])
    return lines


def _linear_in_weights(arguments: Arguments) -> list[str]:
    lines = [
        "## Up to a hundred million weights",
        "",
        "A perceptron of one hidden layer with w inputs and w hidden units; 5 support and 5 query examples, K = 2, "
        "L = 2, one weight sample. A Gaussian has two numbers per weight. Examples cost little, so what is seen is "
        "the vectors of the solvers.",
        "",
        "| | weights | peak MB | peak in vectors of that length | s for one meta-gradient |",
        "|---|---|---|---|---|",
    ]
    for name in ("fomaml", "imaml", "ibaml"):
        for width in arguments.widths:
            problem = _wide_problem(name, width)
            num_weights = sum(value.numel() for value in problem[0].adapted.values())
            call = _whole(*problem)
            start = time.perf_counter()
            peak = peak_bytes_of(call, _CPU)
            seconds = time.perf_counter() - start
            lines.append(
                f"| {name} | {num_weights:,} | {peak / 1e6:,.0f} | {peak / 4 / num_weights:.1f} | {seconds:.1f} |"
            )
            _say(lines[-1])
            del problem, call
    return lines


Problem = tuple[Model, Algorithm, MetaParameters, Episode, TaskNoise]


def _conv_problem(name: str, num_inner_steps: int) -> Problem:
    network = Conv4(5, in_channels=3, image_size=28, channels=32, generator=torch.Generator().manual_seed(0))
    return _problem(network, name, num_inner_steps, num_linear_steps=5, input_shape=(3, 28, 28), num_queries=75)


def _wide_problem(name: str, width: int) -> Problem:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
    return _problem(network, name, 2, num_linear_steps=2, input_shape=(width,), num_queries=5)


def _problem(
    network: nn.Module,
    name: str,
    num_inner_steps: int,
    *,
    num_linear_steps: int,
    input_shape: tuple[int, ...],
    num_queries: int,
) -> Problem:
    generator = torch.Generator().manual_seed(1)
    model = build_model(network, Categorical())
    # A pull towards the prior that outweighs negative curvature, so that conjugate gradients take all their steps.
    settings = {"proximal_strength": 30.0} if name != "ibaml" else {"num_samples": 1}
    algorithm = make_algorithm(
        name,
        inner=GradientDescent(num_steps=num_inner_steps, learning_rate=0.005),
        linear=CG(max_steps=num_linear_steps, rtol=0.0),
        **settings,
    )
    meta = algorithm.init(model.adapted, model.shared, generator=generator)
    support, query = (
        Batch(torch.randn(1, number, *input_shape, generator=generator), (torch.arange(number) % 5).unsqueeze(0))
        for number in (5, num_queries)
    )
    return model, algorithm, meta, Episode(support, query), algorithm.draw_noise(meta, generator=generator)


def _whole(
    model: Model, algorithm: Algorithm, meta: MetaParameters, episodes: Episode, noise: TaskNoise
) -> Callable[[], object]:
    compute = HypergradientStep(model, algorithm)
    compute(meta, episodes, [noise])  # writes the programs
    return lambda: compute(meta, episodes, [noise])


def _seconds_after_inner_steps(
    model: Model, algorithm: Algorithm, meta: MetaParameters, episodes: Episode, noise: TaskNoise
) -> float:
    single = Episode(*(Batch(batch.x[0], batch.y[0]) for batch in episodes))
    marks = [0.0]
    problem = HypergradientProblem(algorithm, model, meta, single, noise)
    problem.hypergradient(lambda: marks.append(time.perf_counter()))
    return time.perf_counter() - marks[-1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
