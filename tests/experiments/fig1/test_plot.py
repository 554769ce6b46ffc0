"""The figures of Fig. 1 and the theorems, read back from their artists."""

import numpy as np
import pytest

from ibaml.experiments.fig1.plot import bounds_figure, errors_figure
from ibaml.experiments.fig1.run import (
    EXACT_SOLVE,
    PRECONDITIONED_BOTH,
    PRECONDITIONED_CG,
    PRECONDITIONED_INNER,
    UNROLLED,
    BoundPoint,
    ErrorPoint,
    Fig1Result,
    Fig1Settings,
    implicit_name,
)
from ibaml.metrics import Estimate

STEPS = (1, 5, 30)
IMPLICIT = [implicit_name(2), implicit_name(5)]
ESTIMATORS = [UNROLLED, *IMPLICIT, EXACT_SOLVE, PRECONDITIONED_CG, PRECONDITIONED_INNER, PRECONDITIONED_BOTH]


@pytest.fixture
def result() -> Fig1Result:
    settings = Fig1Settings(condition_numbers=(5.0, 20.0), inner_steps=STEPS, linear_steps=(2, 5))
    errors = [
        ErrorPoint(name, condition, k, k + 2, 2, Estimate((1 + rank) * condition / k, 0.1, 10))
        for rank, name in enumerate(ESTIMATORS)
        for condition in settings.condition_numbers
        for k in STEPS
    ]
    bounds = [
        BoundPoint(name, k, distance=7 / k, inexactness=(1 + rank) / k, error=0.1 / k, bound=9 / k, largest_ratio=0.5)
        for rank, name in enumerate([UNROLLED, *IMPLICIT])
        for k in STEPS
    ]
    return Fig1Result(settings, errors, bounds)


def curves(axes) -> dict[str, tuple[list[float], list[float]]]:
    found = {line.get_label(): line.get_data() for line in axes.get_lines()}
    return {name: (np.asarray(x).tolist(), np.asarray(y).tolist()) for name, (x, y) in found.items()}


def test_the_panel_of_the_paper_shows_the_errors_at_the_shown_condition_number(result) -> None:
    shown = curves(errors_figure(result).axes[0])
    assert set(shown) == {UNROLLED, *IMPLICIT, EXACT_SOLVE}
    assert shown[UNROLLED] == (list(STEPS), pytest.approx([20 / k for k in STEPS]))
    assert shown[EXACT_SOLVE] == (list(STEPS), pytest.approx([4 * 20 / k for k in STEPS]))


def test_the_other_panels_show_preconditioners_cost_and_every_condition_number(result) -> None:
    _, beyond, cost, conditions = errors_figure(result).axes
    assert {PRECONDITIONED_CG, PRECONDITIONED_INNER, PRECONDITIONED_BOTH} < set(curves(beyond))
    # k + 2 gradients and two products of two gradients each
    assert curves(cost)[UNROLLED][0] == [k + 6 for k in STEPS]
    assert {"condition number 5", "condition number 20"} < set(curves(conditions))
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in errors_figure(result).axes)


def test_the_bounds_stand_above_the_errors(result) -> None:
    distances, bounds = bounds_figure(result).axes
    assert curves(distances)["eps, distance of v"][1] == pytest.approx([7 / k for k in STEPS])
    assert curves(distances)["delta, Jacobian"][1] == pytest.approx([1 / k for k in STEPS])
    assert curves(distances)["delta', linear solver, L=5"][1] == pytest.approx([3 / k for k in STEPS])
    solid, dotted = bounds.get_lines()[:2]
    assert solid.get_label() == UNROLLED
    assert np.asarray(solid.get_ydata()).tolist() == pytest.approx([0.1 / k for k in STEPS])
    assert np.asarray(dotted.get_ydata()).tolist() == pytest.approx([9 / k for k in STEPS])
