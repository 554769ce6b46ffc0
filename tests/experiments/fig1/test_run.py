import pytest
import torch

from ibaml.experiments.fig1 import report
from ibaml.experiments.fig1 import run as fig1
from ibaml.experiments.fig1.run import EXACT_SOLVE, PRECONDITIONED_BOTH, UNROLLED, Fig1Settings, implicit_name


@pytest.fixture(scope="module")
def result():
    settings = Fig1Settings(
        condition_numbers=(20.0,), inner_steps=(2, 15), linear_steps=(2,), num_seeds=2, num_tasks=16
    )
    calls = []
    found = fig1.run(settings, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 4), (4, 4)]
    return found


def error(result, name, num_steps):
    (point,) = [p for p in result.errors if p.estimator == name and p.num_inner_steps == num_steps]
    return point.nrmse.mean


def test_unrolled_is_ahead_with_few_steps_and_implicit_with_more(result):
    assert error(result, UNROLLED, 2) < error(result, implicit_name(2), 2)
    assert error(result, UNROLLED, 15) > error(result, implicit_name(2), 15)


def test_with_a_solved_inner_problem_both_are_exact_and_two_linear_steps_are_not():
    settings = Fig1Settings(
        condition_numbers=(20.0,),
        inner_steps=(300,),
        linear_steps=(2,),
        num_seeds=2,
        num_tasks=2,
        relative_learning_rate=1.8,
    )
    solved = fig1.run(settings)
    assert error(solved, UNROLLED, 300) < 1e-3
    assert error(solved, EXACT_SOLVE, 300) < 1e-3
    assert error(solved, implicit_name(2), 300) > 0.1


def test_preconditioners_at_least_halve_the_error_at_equal_counts(result):
    assert error(result, PRECONDITIONED_BOTH, 15) < 0.5 * error(result, implicit_name(2), 15)


def test_every_task_is_within_the_bounds_of_the_theorems(result):
    assert {point.estimator for point in result.bounds} == {UNROLLED, implicit_name(2)}
    assert all(0 < point.largest_ratio <= 1 for point in result.bounds)
    assert all(point.error <= point.bound for point in result.bounds)


def test_counts(result):
    counts = {(p.estimator, p.num_inner_steps): (p.num_gradients, p.num_hvps) for p in result.errors}
    assert counts[UNROLLED, 15] == (16, 15)
    assert counts[implicit_name(2), 15] == counts[PRECONDITIONED_BOTH, 15] == (17, 2)
    assert counts[EXACT_SOLVE, 15] == (17, 32)


def test_rows_and_summary_tell_the_same(result):
    rows = report.rows(result)
    assert len(rows) == len(result.errors)
    assert rows[0]["nrmse_low"] < rows[0]["nrmse"] < rows[0]["nrmse_high"]
    assert len(report.bound_rows(result)) == 4
    text = report.summary(result)
    assert f"| 15 | {error(result, UNROLLED, 15):.3g} |" in text
    assert f"{implicit_name(2)}: better than unrolled at K = 15." in text


def test_seeds_and_only_seeds_change_the_tasks():
    def point(seed):
        settings = Fig1Settings(
            condition_numbers=(20.0,), inner_steps=(1,), linear_steps=(1,), num_seeds=2, num_tasks=2, seed=seed
        )
        return fig1.run(settings).errors[0].nrmse

    assert point(3) == point(3) != point(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": ()}, r"inner_steps must be one or more numbers of at least 1, but is \(\)"),
        ({"linear_steps": (0, 1)}, r"linear_steps must be .* but is \(0, 1\)"),
        ({"condition_numbers": (0.5,)}, "condition_numbers must be"),
        ({"shown_condition_number": 7.0}, "shown_condition_number must be one of condition_numbers, .* but is 7.0"),
        ({"relative_learning_rate": 2.5}, "relative_learning_rate must be between 0 and 2, but is 2.5"),
        ({"preconditioned_learning_rate": 0.0}, "preconditioned_learning_rate must be between 0 and 2"),
        ({"num_seeds": 1}, "num_seeds must be at least 2 for an interval, but is 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Fig1Settings(**settings)


def test_the_exact_hypergradient_is_the_slope_of_the_exact_outer_loss():
    """Central differences of the outer loss at the closed-form posterior."""
    problem = fig1._problem(Fig1Settings(num_seeds=2, num_tasks=1, num_features=3), 20.0)
    episode = type(problem.episodes)(*(type(b)(b.x[0], b.y[0]) for b in problem.episodes))
    exact = problem.exact_hypergradient(episode)
    step = 1e-5
    for part in ("mean", "log_var"):
        for index in range(3):
            losses = []
            for sign in (1, -1):
                value = getattr(problem.prior, part)["weights"].clone()
                value[index] += sign * step
                prior = problem.prior._replace(**{part: {"weights": value}})
                losses.append(problem.nll(problem.solution(prior, episode.support), episode.query))
            slope = (losses[0] - losses[1]) / (2 * step)
            torch.testing.assert_close(getattr(exact, part)["weights"][index], slope, rtol=1e-6, atol=1e-9)
