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
from typing import Any, NamedTuple, TypeAlias

import torch
import tyro
from torch import nn

from benchmarks.report import replace_between_markers
from ibaml import inner, objectives, tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise, ibaml
from ibaml.curvature import gradient_and_hvp
from ibaml.data import LinearRegressionTasks
from ibaml.experiments.fig1 import Fig1Settings
from ibaml.experiments.fig2 import describe_device
from ibaml.experiments.linear_gaussian import LinearGaussianProblem
from ibaml.gaussian import DiagonalGaussian
from ibaml.hypergradient import gaussian_implicit_hypergradient
from ibaml.likelihoods import Categorical
from ibaml.linear_solve import cg
from ibaml.model import Model, build_model
from ibaml.networks import Conv4
from ibaml.runs import write_text
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolver, PyTree, Tensor

_RESULTS = Path(__file__).resolve().parent / "results"
_MAX_LBFGS_STEPS = 400
_NUM_NEWTON_STEPS = 2
PLAIN = "gradient descent + CG"

# Gradients of some tasks with K inner steps, L products and a relative learning rate.
Estimate: TypeAlias = Callable[[int, int, float, Sequence[int]], Sequence[PyTree]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracySettings:
    """Settings of the comparison.

    Attributes:
        budgets: Pairs (K, L) of inner steps and Hessian-vector products.
        relative_learning_rates: Grid of learning rates. The unit is the method's own: the inverse of the largest
            curvature for gradient descent, a Newton step for the natural gradient, a standard deviation of the prior
            for Adam.
        num_tuning_tasks: Tasks that learning rates are chosen on.
        num_tasks: Tasks that the error is measured on.
        num_channels: Channels of the Conv4.
        image_size: Side of its images.
        prior_log_vars: Ranges of the prior's log-variances: as initialised, and as spread as training makes them.
        num_samples: Weight samples S.
        temperature: Of the inner problem of the Conv4.
        seed: Seed of tasks, weights and noise.
        num_threads: CPU threads; None leaves torch its choice.
        output: The result file; None: benchmarks/results/DATE-accuracy-per-cost.md.
        update_readme: Put the headline ratios into the README.
    """

    budgets: tuple[tuple[int, int], ...] = ((5, 5), (10, 10), (15, 15))
    relative_learning_rates: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-10, 3))
    num_tuning_tasks: int = 1
    num_tasks: int = 3
    num_channels: int = 8
    image_size: int = 14
    prior_log_vars: tuple[tuple[float, float], ...] = ((-10.0, -9.0), (-10.0, -6.0))
    num_samples: int = 1
    temperature: float = 0.05
    seed: int = 0
    num_threads: int | None = None
    output: Path | None = None
    update_readme: bool = False

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("budgets", "relative_learning_rates", "prior_log_vars"):
            if not getattr(self, field):
                raise ValueError(f"{field} must have at least one entry, but is empty.")
        if min(min(budget) for budget in self.budgets) < 1:
            raise ValueError(f"budgets must be pairs of numbers of at least 1, but are {self.budgets}.")
        if not min(self.relative_learning_rates) > 0:
            raise ValueError(f"relative_learning_rates must be positive, but are {self.relative_learning_rates}.")
        for field in ("num_tuning_tasks", "num_tasks", "num_samples"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")


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
    natural = objectives.natural_gradient(problem.kl_weight)

    def gradient_descent(rate: float, num_steps: int, momentum: float) -> InnerSolver:
        rate *= problem.learning_rate
        return partial(inner.gradient_descent, num_steps=num_steps, learning_rate=rate, momentum=momentum)

    def natural_gradient(rate: float, num_steps: int) -> InnerSolver:
        return partial(
            inner.preconditioned_gradient_descent, num_steps=num_steps, learning_rate=rate, preconditioner=natural
        )

    def adam(rate: float, num_steps: int) -> InnerSolver:
        return partial(inner.adam, num_steps=num_steps, learning_rate=rate)

    def method(solver: Callable[[float, int], InnerSolver], precondition: bool) -> Estimate:
        def estimate(num_steps: int, num_products: int, rate: float, chosen: Sequence[int]) -> list[PyTree]:
            linear_solver = partial(cg, max_steps=num_products, rtol=0.0)
            one_task = partial(problem.implicit, solver(rate, num_steps), linear_solver, precondition)
            return _unstack(torch.func.vmap(one_task)(tree.map(lambda leaf: leaf[list(chosen)], episodes)))

        return estimate

    methods = {
        PLAIN: method(partial(gradient_descent, momentum=0.0), False),
        "gradient descent + preconditioned CG": method(partial(gradient_descent, momentum=0.0), True),
        "momentum 0.5 + preconditioned CG": method(partial(gradient_descent, momentum=0.5), True),
        "momentum 0.8 + preconditioned CG": method(partial(gradient_descent, momentum=0.8), True),
        "Adam + preconditioned CG": method(adam, True),
        "natural gradient + preconditioned CG": method(natural_gradient, True),
    }
    return compare(f"Fig. 1, condition number {fig1.shown_condition_number:g}", methods, exact, many)


class ConvProblem(NamedTuple):
    """A small Conv4 with tasks and their converged meta-gradients.

    Attributes:
        model: The network.
        algorithm: iBaML with all settings but the inner solver's.
        meta: Meta-parameters.
        episodes: One per task.
        noises: One per task.
        exact: Converged meta-gradients.
        largest_curvature: Of the inner loss, over all tasks, in (mean, log-variance).
        inner_grad_norm: Largest relative gradient norm that is left in the reference solutions.
        linear_residual: Largest relative residual that is left in the reference systems.
    """

    model: Model
    algorithm: Algorithm
    meta: MetaParameters
    episodes: list[Episode]
    noises: list[TaskNoise]
    exact: list[PyTree]
    largest_curvature: float
    inner_grad_norm: float
    linear_residual: float

    def estimate(self, num_steps: int, num_products: int, tasks: Sequence[int], **changes: Any) -> list[PyTree]:
        """Returns the meta-gradients of some tasks at some cost."""
        algorithm = dataclasses.replace(
            self.algorithm, num_inner_steps=num_steps, num_linear_steps=num_products, **changes
        )
        return [
            algorithm.hypergradient(self.model.nll, self.meta, self.episodes[task], self.noises[task])[0].prior
            for task in tasks
        ]


def build_conv_problem(settings: AccuracySettings, prior_log_var: tuple[float, float]) -> ConvProblem:
    """Builds network and tasks and solves every inner problem to the end."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.image_size
    network = Conv4(5, image_size=size, channels=settings.num_channels, downsample="stride", generator=generator)
    for index, module in enumerate(network.features):
        if isinstance(module, nn.ReLU):
            # Without kinks there is a solution at which the gradient vanishes and the Hessian exists.
            network.features[index] = nn.SiLU()
    model = build_model(network.double(), Categorical())
    algorithm = ibaml(
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        linear_rtol=0.0,
        precondition=False,
        initial_log_var=prior_log_var,
    )
    meta = algorithm.init(model.adapted, model.shared, generator=generator)

    def batch(prototypes: Tensor) -> Batch:
        labels = torch.arange(5).repeat_interleave(5)
        noise = torch.randn((25, 1, size, size), generator=generator, dtype=torch.float64)
        return Batch(prototypes[labels] + noise, labels)

    episodes: list[Episode] = []
    for _ in range(settings.num_tuning_tasks + settings.num_tasks):
        prototypes = torch.randn((5, 1, size, size), generator=generator, dtype=torch.float64)
        episodes.append(Episode(batch(prototypes), batch(prototypes)))
    noises = [algorithm.draw_noise(meta, generator=generator) for _ in episodes]
    unsolved = ConvProblem(model, algorithm, meta, episodes, noises, [], 0.0, 0.0, 0.0)
    return _solve(unsolved)


def conv_tasks(
    settings: AccuracySettings, prior_log_var: tuple[float, float], on_progress: Callable[[float], None]
) -> tuple[list[Row], str]:
    """A small Conv4; also returns how well the reference is converged."""
    problem = build_conv_problem(settings, prior_log_var)
    low, high = prior_log_var
    deviation = math.exp((low + high) / 4)

    def descent(num_steps: int, num_products: int, rate: float, tasks: Sequence[int], **changes: Any) -> list[PyTree]:
        rate /= problem.largest_curvature
        return problem.estimate(num_steps, num_products, tasks, inner_learning_rate=rate, **changes)

    def adam(num_steps: int, num_products: int, rate: float, tasks: Sequence[int]) -> list[PyTree]:
        changes = {"inner_optimizer": "adam", "inner_learning_rate": rate * deviation, "precondition": True}
        return problem.estimate(num_steps, num_products, tasks, **changes)

    def natural_gradient(num_steps: int, num_products: int, rate: float, tasks: Sequence[int]) -> list[PyTree]:
        changes = {"inner_optimizer": "natural_gradient", "inner_learning_rate": rate, "precondition": True}
        return problem.estimate(num_steps, num_products, tasks, **changes)

    methods: dict[str, Estimate] = {
        PLAIN: descent,
        "gradient descent + preconditioned CG": partial(descent, precondition=True),
        "momentum 0.5 + preconditioned CG": partial(descent, precondition=True, inner_momentum=0.5),
        "momentum 0.8 + preconditioned CG": partial(descent, precondition=True, inner_momentum=0.8),
        "Adam + preconditioned CG": adam,
        "natural gradient + preconditioned CG": natural_gradient,
    }
    name = f"Conv4, prior log-variances in [{low:g}, {high:g}]"
    note = (
        f"{name}: in the reference at most {problem.inner_grad_norm:.0e} of the inner gradient at the prior is left, "
        f"and {problem.linear_residual:.0e} of the right-hand side of the linear system."
    )
    return compare(name, methods, problem.exact, settings, on_progress), note


def _solve(problem: ConvProblem) -> ConvProblem:
    """Adds reference solutions and the largest curvature."""
    exact: list[PyTree] = []
    grad_norms: list[float] = []
    residuals: list[float] = []
    curvatures: list[float] = []
    for episode, noise in zip(problem.episodes, problem.noises, strict=True):
        weight = objectives.kl_weight(len(episode.support.y), problem.algorithm.temperature)
        loss = partial(_inner_loss, problem, episode, noise, weight)
        curvatures.append(_largest_curvature(loss, problem.meta.prior))
        solution = _minimise(loss, problem.meta.prior, weight)
        gradient, info = _gradient_at(problem, episode, noise, solution)
        exact.append(gradient)
        grad_norms.append(float(info.inner_grad_norm / tree.norm(torch.func.grad(loss)(problem.meta.prior))))
        residuals.append(float(info.linear_residual))
    return problem._replace(
        exact=exact,
        largest_curvature=max(curvatures),
        inner_grad_norm=max(grad_norms),
        linear_residual=max(residuals),
    )


def _expected_nll(problem: ConvProblem, posterior: PyTree, noise: PyTree, batch: Batch) -> Tensor:
    return objectives.expected_nll(lambda weights, b: problem.model.nll(weights, {}, b), posterior, noise, batch)


def _inner_loss(problem: ConvProblem, episode: Episode, noise: TaskNoise, weight: float, posterior: PyTree) -> Tensor:
    expected = _expected_nll(problem, posterior, noise.inner, episode.support)
    return objectives.negative_elbo(expected, posterior, problem.meta.prior, weight)


def _minimise(loss: Callable[[PyTree], Tensor], prior: DiagonalGaussian, weight: float) -> PyTree:
    """L-BFGS in coordinates in which the Hessian of the KL term is one at the prior, then Newton steps."""
    scale = DiagonalGaussian(
        tree.map(lambda log_var: torch.exp(0.5 * log_var) / math.sqrt(weight), prior.log_var),
        tree.map(lambda log_var: torch.full_like(log_var, math.sqrt(2 / weight)), prior.log_var),
    )
    zeros, unravel = tree.ravel(tree.zeros_like(prior))
    white = zeros.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [white], max_iter=_MAX_LBFGS_STEPS, history_size=50, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def place(vector: Tensor) -> PyTree:
        return tree.add(prior, tree.mul(scale, unravel(vector)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(place(white))
        value.backward()
        return value

    optimizer.step(closure)
    solution = tree.detach(place(white))
    for _ in range(_NUM_NEWTON_STEPS):
        gradient, product = gradient_and_hvp(loss, solution)
        step = cg(
            product, gradient, max_steps=1000, rtol=1e-6, preconditioner=partial(tree.mul, tree.mul(scale, scale))
        )
        solution = tree.sub(solution, step.value)
    return solution


def _gradient_at(
    problem: ConvProblem, episode: Episode, noise: TaskNoise, solution: PyTree
) -> tuple[PyTree, HypergradientInfo]:
    return gaussian_implicit_hypergradient(
        lambda posterior: _expected_nll(problem, posterior, noise.inner, episode.support),
        lambda posterior, prior: _expected_nll(problem, posterior, noise.outer, episode.query),
        solution,
        problem.meta.prior,
        objectives.kl_weight(len(episode.support.y), problem.algorithm.temperature),
        partial(cg, max_steps=3000, rtol=1e-10),
    )


def _largest_curvature(loss: Callable[[PyTree], Tensor], point: PyTree) -> float:
    """Returns the largest absolute eigenvalue of the Hessian, by power iteration."""
    product = gradient_and_hvp(loss, point)[1]
    vector, size = tree.map(torch.ones_like, point), 0.0
    for _ in range(30):
        vector = product(tree.scale(1 / tree.norm(vector), vector))
        size = float(tree.norm(vector))
    return size


def summary(rows: Sequence[Row], notes: Sequence[str], settings: AccuracySettings, command: str) -> str:
    """Returns the result as Markdown."""
    grid = settings.relative_learning_rates
    lines = [
        f"# Accuracy of meta-gradients at equal cost, {date.today():%d %B %Y}",
        "",
        f"`{command}` on {describe_device(torch.device('cpu'))}.",
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
        lines = [
            *headline(rows),
            "",
            f"All methods and settings: [benchmarks/results/{output.name}](benchmarks/results/{output.name}).",
        ]
        write_text(readme, replace_between_markers(readme.read_text(), "accuracy", "\n".join(lines)))


if __name__ == "__main__":
    main(tyro.cli(AccuracySettings))
