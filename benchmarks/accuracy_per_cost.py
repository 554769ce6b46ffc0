"""How accurate meta-gradients are at equal cost: ``python -m benchmarks.accuracy_per_cost --help``.

Plain gradient descent followed by plain conjugate gradients, as in the paper, against what the library offers at the
same number of gradients and Hessian-vector products. Two kinds of problems, both in float64: the linear regression of
Fig. 1, whose meta-gradient is known in closed form, and a small Conv4, whose inner problem is solved to the end for
reference. Every method gets the best learning rate of the same grid, chosen on other tasks than it is judged on.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import tyro

from benchmarks.conv_reference import build_conv_problem
from benchmarks.report import replace_between_markers
from benchmarks.settings import AccuracySettings
from ibaml import tree
from ibaml.data import LinearRegressionTasks
from ibaml.experiments.fig1.linear_gaussian import LinearGaussianProblem
from ibaml.experiments.fig1.run import Fig1Settings
from ibaml.experiments.report import describe_device
from ibaml.learner.folder import write_text
from ibaml.priors.diagonal import DiagonalGeometry
from ibaml.solvers.inner import Adam, GradientDescent, InnerSolver, NaturalGradient
from ibaml.solvers.linear import CG
from ibaml.types import PyTree

_RESULTS = Path(__file__).resolve().parent / "results"
PLAIN = "gradient descent + CG"
TWO_RATES = "two rates, momentum 0.3 + preconditioned CG"

# Gradients of some tasks with K inner steps, L products and a relative learning rate.
Estimate: TypeAlias = Callable[[int, int, float, Sequence[int]], Sequence[PyTree]]


class Row(NamedTuple):
    """The error of one method at one cost.

    Attributes:
        problem: Which problem.
        num_inner_steps: K.
        num_products: L.
        method: Name.
        learning_rate: The best of the grid on the tuning tasks, relative.
        nrmse: Root of the summed squared error over the tasks, over that of the exact gradients.
    """

    problem: str
    num_inner_steps: int
    num_products: int
    method: str
    learning_rate: float
    nrmse: float


def nrmse(estimates: Sequence[PyTree], exact: Sequence[PyTree]) -> float:
    """Returns the root of the summed squared error over that of the exact values; infinity if it is not finite."""
    error = sum(float(tree.norm(tree.sub(a, b))) ** 2 for a, b in zip(estimates, exact, strict=True))
    value = math.sqrt(error / sum(float(tree.norm(each)) ** 2 for each in exact))
    return value if math.isfinite(value) else math.inf


def compare(
    problem: str,
    methods: dict[str, Estimate],
    exact: Sequence[PyTree],
    settings: AccuracySettings,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[Row]:
    """Measures all methods at all costs; the first tasks are for tuning, the others for judging.

    Args:
        problem: Its name.
        methods: By name.
        exact: The exact gradients of all tasks.
        settings: Costs, grid of learning rates and number of tasks for tuning.
        on_progress: Called after every method with the part of the work that is done.
    """
    tuning, judged = range(settings.num_tuning_tasks), range(settings.num_tuning_tasks, len(exact))
    rows: list[Row] = []
    done, total = 0, len(methods) * sum(map(sum, settings.budgets))
    for num_steps, num_products in settings.budgets:
        for name, estimate in methods.items():
            errors = {
                rate: nrmse(estimate(num_steps, num_products, rate, tuning), [exact[t] for t in tuning])
                for rate in settings.relative_learning_rates
            }
            best = min(errors, key=errors.__getitem__)
            found = nrmse(estimate(num_steps, num_products, best, judged), [exact[t] for t in judged])
            rows.append(Row(problem, num_steps, num_products, name, best, found))
            done += num_steps + num_products
            on_progress(done / total)
    return rows


def linear_regression(settings: AccuracySettings) -> list[Row]:
    """The problem of Fig. 1, with the closed form as reference."""
    fig1 = Fig1Settings()
    ones = torch.ones(fig1.num_features, dtype=torch.float64)
    tasks = LinearRegressionTasks(
        prior_mean=0 * ones,
        prior_variance=ones,
        noise_variance=fig1.noise_variance,
        num_shots=fig1.num_shots,
        num_queries=fig1.num_queries,
        condition_number=fig1.shown_condition_number,
        dtype=torch.float64,
    )
    # Tasks cost next to nothing here.
    many = dataclasses.replace(settings, num_tuning_tasks=16, num_tasks=32)
    generator = torch.Generator().manual_seed(settings.seed)
    episodes = tasks.sample(many.num_tuning_tasks + many.num_tasks, generator=generator)
    problem = LinearGaussianProblem(episodes, noise_variance=fig1.noise_variance, relative_learning_rate=1.0)
    exact = _unstack(torch.func.vmap(problem.exact_hypergradient)(episodes))
    geometry = DiagonalGeometry(problem.prior, problem.kl_weight)

    def gradient_descent(rate: float, num_steps: int, momentum: float) -> InnerSolver:
        return GradientDescent(num_steps=num_steps, learning_rate=rate * problem.learning_rate, momentum=momentum)

    def natural_gradient(rate: float, num_steps: int) -> InnerSolver:
        return NaturalGradient(num_steps=num_steps, learning_rate=rate)

    def two_rates(rate: float, num_steps: int) -> InnerSolver:
        return _two_rates(rate, rate * problem.learning_rate, num_steps)

    def adam(rate: float, num_steps: int) -> InnerSolver:
        return Adam(num_steps=num_steps, learning_rate=rate)

    def method(solver: Callable[[float, int], InnerSolver], precondition: bool) -> Estimate:
        def estimate(num_steps: int, num_products: int, rate: float, chosen: Sequence[int]) -> list[PyTree]:
            linear_solver = CG(max_steps=num_products, rtol=0.0)
            inner = partial(solver(rate, num_steps), geometry=geometry)
            one_task = partial(problem.implicit, inner, linear_solver, precondition)
            return _unstack(torch.func.vmap(one_task)(tree.map(lambda leaf: leaf[list(chosen)], episodes)))

        return estimate

    methods = {
        PLAIN: method(partial(gradient_descent, momentum=0.0), False),
        "gradient descent + preconditioned CG": method(partial(gradient_descent, momentum=0.0), True),
        "momentum 0.5 + preconditioned CG": method(partial(gradient_descent, momentum=0.5), True),
        "Adam + preconditioned CG": method(adam, True),
        "natural gradient + preconditioned CG": method(natural_gradient, True),
        TWO_RATES: method(two_rates, True),
    }
    return compare(f"Fig. 1, condition number {fig1.shown_condition_number:g}", methods, exact, many)


def _two_rates(rate: float, learning_rate: float, num_steps: int) -> GradientDescent:
    """Returns descent with the rate of the log-variances that goes with one of the means.

    Args:
        rate: That of the means in units of the inverse curvature.
        learning_rate: The same as it is.
        num_steps: Number of steps.
    """
    return GradientDescent(
        num_steps=num_steps, learning_rate=learning_rate, momentum=0.3, curvature_rate=min(0.4, rate / 4)
    )


def conv_tasks(
    settings: AccuracySettings, prior_log_var: tuple[float, float], on_progress: Callable[[float], None]
) -> tuple[list[Row], str]:
    """A small Conv4; also returns how well the reference is converged."""
    problem = build_conv_problem(settings, prior_log_var)
    low, high = prior_log_var
    deviation = math.exp((low + high) / 4)

    def method(solver: Callable[[float, int], InnerSolver], precondition: bool) -> Estimate:
        def estimate(num_steps: int, num_products: int, rate: float, tasks: Sequence[int]) -> list[PyTree]:
            linear = CG(max_steps=num_products, rtol=0.0)
            return problem.estimate(solver(rate, num_steps), linear, tasks, precondition=precondition)

        return estimate

    def descent(rate: float, num_steps: int, momentum: float = 0.0) -> InnerSolver:
        rate /= problem.largest_curvature
        return GradientDescent(num_steps=num_steps, learning_rate=rate, momentum=momentum)

    def adam(rate: float, num_steps: int) -> InnerSolver:
        return Adam(num_steps=num_steps, learning_rate=rate * deviation)

    def natural_gradient(rate: float, num_steps: int) -> InnerSolver:
        return NaturalGradient(num_steps=num_steps, learning_rate=rate)

    def two_rates(rate: float, num_steps: int) -> InnerSolver:
        return _two_rates(rate, rate / problem.largest_curvature, num_steps)

    methods: dict[str, Estimate] = {
        PLAIN: method(descent, False),
        "gradient descent + preconditioned CG": method(descent, True),
        "momentum 0.5 + preconditioned CG": method(partial(descent, momentum=0.5), True),
        "Adam + preconditioned CG": method(adam, True),
        "natural gradient + preconditioned CG": method(natural_gradient, True),
        TWO_RATES: method(two_rates, True),
    }
    name = f"Conv4, prior log-variances in [{low:g}, {high:g}]"
    note = (
        f"{name}: in the reference at most {problem.inner_grad_norm:.0e} of the inner gradient at the prior is left, "
        f"and {problem.linear_residual:.0e} of the right-hand side of the linear system."
    )
    return compare(name, methods, problem.exact, settings, on_progress), note


def summary(rows: Sequence[Row], notes: Sequence[str], settings: AccuracySettings, command: str) -> str:
    """Returns the result as Markdown."""
    grid = settings.relative_learning_rates
    lines = [
        f"# Accuracy of meta-gradients at equal cost, {date.today():%d %B %Y}",
        "",
        f"`{command}` on {describe_device(torch.device('cpu'))}, torch {torch.__version__}.",
        "",
        "iBaML, float64. NRMSE of the meta-gradient in (m, log D) against the converged one, over tasks that the "
        "learning rates were not chosen on. At the same K and L all methods cost the same: K + 2 gradients and L "
        f"Hessian-vector products. Every method has the best of {len(grid)} learning rates ({min(grid):g} to "
        f"{max(grid):g} of its own unit: the inverse of the largest curvature, a Newton step, a standard deviation of "
        f"the prior). Conv4: {settings.num_channels} channels, {settings.image_size} x {settings.image_size}, strided, "
        f"SiLU, 5-way 5-shot, S = {settings.num_samples}, temperature {settings.temperature:g}, "
        f"{settings.num_tasks} tasks.",
        "",
        *[f"- {note}" for note in notes],
        "",
        *headline(rows),
    ]
    for problem in dict.fromkeys(row.problem for row in rows):
        lines += [
            "",
            f"## {problem}",
            "",
            "| K | L | method | learning rate | NRMSE | NRMSE / plain |",
            "|---|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row.problem == problem):
            plain = plain_row(rows, row)
            lines.append(
                f"| {row.num_inner_steps} | {row.num_products} | {row.method} | {row.learning_rate:g} "
                f"| {row.nrmse:.3g} | {row.nrmse / plain.nrmse:.2f} |"
            )
    return "\n".join(lines) + "\n"


def headline(rows: Sequence[Row]) -> list[str]:
    """Returns the most accurate method at every cost against the plain one, as a table; the target is 0.5 or less."""
    lines = [
        "| problem | K | L | most accurate | NRMSE | of plain gradient descent and CG | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for plain in (row for row in rows if row.method == PLAIN):
        best = min((row for row in rows if row[:3] == plain[:3] and row is not plain), key=lambda row: row.nrmse)
        lines.append(
            f"| {best.problem} | {best.num_inner_steps} | {best.num_products} | {best.method} | {best.nrmse:.3g} "
            f"| {plain.nrmse:.3g} | {best.nrmse / plain.nrmse:.2f} |"
        )
    return lines


def plain_row(rows: Sequence[Row], row: Row) -> Row:
    """Returns the row of the plain method on the same problem at the same cost."""
    return next(each for each in rows if each[:3] == row[:3] and each.method == PLAIN)


def _unstack(stacked: PyTree) -> list[PyTree]:
    num_tasks = tree.leaves(stacked)[0].shape[0]
    return [tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_tasks)]


def main(settings: AccuracySettings) -> None:
    """Runs the comparison and writes the result file."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    rows, notes = linear_regression(settings), []
    start = time.monotonic()
    for done, prior_log_var in enumerate(settings.prior_log_vars):

        def on_progress(part: float, done: int = done) -> None:
            part = (done + part) / len(settings.prior_log_vars)
            minutes = (time.monotonic() - start) / 60
            print(f"{part:.0%} done, about {minutes * (1 / part - 1):.1f} min left", file=sys.stderr, flush=True)

        found, note = conv_tasks(settings, prior_log_var, on_progress)
        rows += found
        notes.append(note)
    command = f"python -m benchmarks.accuracy_per_cost {' '.join(sys.argv[1:])}".strip()
    text = summary(rows, notes, settings, command)
    output = settings.output or _RESULTS / f"{date.today().isoformat()}-accuracy-per-cost.md"
    write_text(output, text)
    print(text)
    print(f"Written to {output}", file=sys.stderr)
    if settings.update_readme:
        readme = _RESULTS.parents[1] / "README.md"
        place = f"benchmarks/results/{output.name}"
        lines = [
            f"Measured on {date.today():%d %B %Y} in float64; all methods and settings are in [{place}]({place}).",
            "",
            *headline(rows),
        ]
        write_text(readme, replace_between_markers(readme.read_text(), "accuracy", "\n".join(lines)))


if __name__ == "__main__":
    main(tyro.cli(AccuracySettings))
