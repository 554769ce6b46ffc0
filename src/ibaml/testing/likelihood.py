"""What every likelihood and its prediction promise."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ibaml import tree
from ibaml.likelihoods import Likelihood
from ibaml.likelihoods.mixture import NumberLikelihood
from ibaml.testing.base import (
    DIFFERENCE,
    assert_close,
    assert_json_round_trip,
    central_difference,
    draw,
    draw_like,
    generator,
    over_seeds,
)
from ibaml.types import Params, Tensor

_NUM_EXAMPLES = 5
_NUM_CLASSES = 3
_LARGEST_COUNT = 400
_NUM_POINTS = 20_001


class _Case(NamedTuple):
    """Outputs of some weight samples, targets, and parameters near the initial ones; in float64."""

    likelihood: Likelihood
    outputs: Tensor
    targets: Tensor
    parameters: Params

    def predict(self, num_samples: int | None = None) -> Any:
        return self.likelihood.predict(self.outputs[:num_samples], self.parameters)

    def nll(self, outputs: Tensor) -> Tensor:
        return self.likelihood.nll(outputs, self.targets, self.parameters)


class LikelihoodContract:
    """The nll against the density that the prediction implies, and all numbers of a prediction against that density.

    Sums over classes or counts and numerical integrals over real targets are the oracles, so that nothing is compared
    with a formula of the likelihood's own.
    """

    @staticmethod
    def make() -> Likelihood:
        """Returns the likelihood to test."""
        raise NotImplementedError

    @pytest.fixture
    def likelihood(self) -> Likelihood:
        """The likelihood to test."""
        return self.make()

    def test_nll_is_that_of_a_prediction_of_one_sample(self, likelihood: Likelihood) -> None:
        """And a prediction of several is their mixture."""

        def check(seed: int) -> None:
            case = _case(likelihood, seed=seed)
            each = torch.stack([case.nll(outputs) for outputs in case.outputs])
            assert each.shape == (len(case.outputs), _NUM_EXAMPLES)
            assert_close(case.predict(1).nll(case.targets), each[0])
            assert_close(case.predict().nll(case.targets), math.log(len(each)) - torch.logsumexp(-each, 0))

        over_seeds(check)

    def test_probabilities_sum_to_one(self, likelihood: Likelihood) -> None:
        """Over classes, counts or the real line; of the nll and of a tempered prediction."""
        case = _case(likelihood, num_targets=1)
        values, weights = _support(case)
        example = case.outputs[0, 0].expand(len(values), -1)
        density = torch.exp(-case.likelihood.nll(example, values, case.parameters))
        assert_close((weights * density).sum(), torch.ones(()).double(), 1e-6)
        tempered = _on_grid(case, values).tempered(1.5)
        assert_close((weights * torch.exp(-tempered.nll(values))).sum(), torch.ones(()).double(), 1e-6)

    def test_derivatives_equal_central_differences(self, likelihood: Likelihood) -> None:
        """In outputs and parameters, once and twice: the inner problem needs a Hessian."""
        case = _case(likelihood)

        def loss(point: tuple[Tensor, Params]) -> Tensor:
            return case.likelihood.nll(point[0], case.targets, point[1]).sum()

        at = (case.outputs[0], case.parameters)
        gradient = torch.func.grad(loss)(at)
        assert_close(gradient, central_difference(loss, at), DIFFERENCE)
        direction = draw_like(at, seed=7)

        def slope(point: tuple[Tensor, Params]) -> Tensor:
            return tree.dot(torch.func.grad(loss)(point), direction)

        assert_close(torch.func.grad(slope)(at), central_difference(slope, at), 10 * DIFFERENCE)

    def test_derivatives_in_each_output_are_those_of_the_nll(self, likelihood: Likelihood) -> None:
        """Where a likelihood gives them: in the first output of each target."""
        case = _case(likelihood)
        if not isinstance(likelihood, NumberLikelihood):
            pytest.skip("an output by itself has no nll")
        slope = torch.func.grad(lambda at: case.nll(at).sum())
        assert isinstance(case.likelihood, NumberLikelihood)
        found = case.likelihood.derivatives(case.outputs[0], case.targets, case.parameters)
        first = slice(case.targets.shape[-1])
        assert case.likelihood.likeliest(case.targets).shape == case.targets.shape
        assert torch.isfinite(case.likelihood.likeliest(case.targets)).all()
        assert_close(found[0], slope(case.outputs[0])[..., first])
        assert_close(found[1], torch.func.grad(lambda at: slope(at)[..., first].sum())(case.outputs[0])[..., first])

    def test_moments_are_those_of_the_density(self, likelihood: Likelihood) -> None:
        """Mean and variance of numbers, entropy of classes; aleatoric and epistemic parts add up."""
        case = _case(likelihood, num_targets=1)
        values, weights = _support(case)
        prediction, grid = case.predict(), _on_grid(case, values)
        log_density = -grid.nll(values)
        mass = weights * torch.exp(log_density)
        if likelihood.target_kind == "classes":
            expected = -(mass * log_density).sum()
        else:
            mean = (mass * values[:, 0]).sum()
            assert_close(prediction.mean[0, 0], mean, 1e-5)
            expected = (mass * (values[:, 0] - mean) ** 2).sum()
        assert_close(prediction.total_uncertainty[0].squeeze(), expected, 1e-4)
        assert_close(prediction.aleatoric + prediction.epistemic, prediction.total_uncertainty)
        assert (prediction.epistemic >= 0).all() and (prediction.aleatoric >= 0).all()
        assert_close(case.predict(1).epistemic, torch.zeros_like(prediction.epistemic))

    def test_cdf_and_quantile_are_those_of_the_density(self, likelihood: Likelihood) -> None:
        """Of numbers: the cdf against its integral, and the quantile is where it reaches a probability."""
        if likelihood.target_kind == "classes":
            pytest.skip("classes have no order")
        case = _case(likelihood, num_targets=1)
        values, weights = _support(case)
        grid, prediction = _on_grid(case, values), case.predict()
        mass = weights * torch.exp(-grid.nll(values))
        # The midpoint rule gives the integral up to the middle of a cell.
        below = mass.cumsum(0) if likelihood.target_kind == "counts" else mass.cumsum(0) - 0.5 * mass
        assert_close(grid.cdf(values)[:, 0], below, 1e-4)
        for probability in (0.01, 0.3, 0.5, 0.95):
            quantile = prediction.quantile(probability)
            reached = prediction.cdf(quantile)
            if likelihood.target_kind == "counts":
                assert (reached >= probability).all() and (prediction.cdf(quantile - 1) < probability).all()
            else:
                assert_close(reached, torch.full_like(reached, probability), 1e-9)
        assert_close(prediction.interval(0.9), (prediction.quantile(0.05), prediction.quantile(0.95)))

    def test_temperature_makes_less_sure_or_surer(self, likelihood: Likelihood) -> None:
        """1 changes nothing, and a temperature is undone by its inverse."""
        case = _case(likelihood)
        prediction = case.predict()
        unchanged = prediction.nll(case.targets)
        assert_close(prediction.tempered(1.0).nll(case.targets), unchanged)
        assert_close(prediction.tempered(2.0).tempered(0.5).nll(case.targets), unchanged)
        assert (prediction.tempered(2.0).total_uncertainty >= prediction.total_uncertainty).all()
        assert (prediction.tempered(0.5).total_uncertainty <= prediction.total_uncertainty).all()
        assert (prediction.tempered(2.0).total_uncertainty > prediction.total_uncertainty).any()

    def test_other_units_change_the_density_by_their_factor(self, likelihood: Likelihood) -> None:
        """Of real targets; classes and counts have no unit."""
        case = _case(likelihood)
        prediction = case.predict()
        if likelihood.target_kind != "real":
            same = prediction.rescaled(torch.zeros(()), torch.ones(()))
            assert_close(same.nll(case.targets), prediction.nll(case.targets))
            return
        mean, scale = torch.tensor([3.0, -1.0]).double(), torch.tensor([2.0, 0.5]).double()
        rescaled = prediction.rescaled(mean, scale)
        assert_close(rescaled.mean, prediction.mean * scale + mean)
        assert_close(rescaled.total_uncertainty, prediction.total_uncertainty * scale**2)
        found = rescaled.nll(case.targets * scale + mean)
        assert_close(found, prediction.nll(case.targets) + torch.log(scale).sum())

    def test_targets_that_cannot_be_scored_are_refused_by_name(self, likelihood: Likelihood) -> None:
        """Every message names the argument; good targets pass."""
        case = _case(likelihood)
        num_outputs = case.outputs.shape[-1]
        case.likelihood.check_targets("support.y", case.targets, num_outputs)
        case.likelihood.check_targets("support.y", case.targets.expand(2, *case.targets.shape), num_outputs)
        if likelihood.target_kind == "classes":
            bad = [case.targets.double(), case.targets - 10, case.targets + num_outputs]
        else:
            bad = [case.targets[:, :1], case.targets[:, 0], torch.full_like(case.targets, math.nan)]
            bad += [case.targets - 1000, case.targets + 0.5] if likelihood.target_kind == "counts" else []
        for targets in bad:
            with pytest.raises(ValueError, match=r"^support\.y has "):
                case.likelihood.check_targets("support.y", targets, num_outputs)

    def test_vmap_equals_the_loop(self, likelihood: Likelihood) -> None:
        """Values, gradients and the score of a step."""
        case = _case(likelihood)

        def compute(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gradient = torch.func.grad(lambda f: case.nll(f).sum())(outputs)
            return case.nll(outputs), gradient, case.likelihood.step_score(outputs, case.targets)

        batched = torch.func.vmap(compute)(case.outputs)
        for index, outputs in enumerate(case.outputs):
            assert_close(tree.map(lambda leaf, i=index: leaf[i], batched), compute(outputs))

    def test_half_precision_is_computed_in_float32(self, likelihood: Likelihood) -> None:
        """The nll of 16-bit outputs is that of the same numbers in float64, to the precision of float32."""
        case = _case(likelihood)
        parameters = tree.map(lambda leaf: leaf.float(), case.parameters)
        for dtype in (torch.float16, torch.bfloat16):
            outputs = case.outputs[0].to(dtype)
            targets = case.targets.to(dtype) if case.targets.is_floating_point() else case.targets
            narrow = case.likelihood.nll(outputs, targets, parameters)
            wide_targets = targets.double() if case.targets.is_floating_point() else targets
            wide = case.likelihood.nll(outputs.double(), wide_targets, case.parameters)
            assert narrow.dtype == torch.float32
            assert_close(narrow.double(), wide, 1e-4)

    def test_known_variance_of_the_outputs_is_taken_in_or_refused(self, likelihood: Likelihood) -> None:
        """None and zero are the same; a variance adds to what more data would remove."""
        case = _case(likelihood)
        try:
            found: Any = case.likelihood.predict(
                case.outputs, case.parameters, output_variance=torch.zeros_like(case.outputs)
            )
        except ValueError as error:
            assert "output_variance" in str(error), error
            return
        assert_close(found.nll(case.targets), case.predict().nll(case.targets))
        wider = case.likelihood.predict(
            case.outputs, case.parameters, output_variance=torch.full_like(case.outputs, 0.3)
        )
        assert (wider.epistemic > found.epistemic).all()
        if likelihood.target_kind == "real":
            # The noise of a count grows with its mean, which is one of a logarithm.
            assert_close(wider.aleatoric, found.aleatoric)

    def test_scores_are_scalars_with_the_nll_among_them(self, likelihood: Likelihood) -> None:
        """float64 scalars by name; those over all tasks have other names."""
        case = _case(likelihood)
        prediction = case.predict()
        scores = prediction.scores(case.targets)
        assert all(score.shape == () and score.dtype == torch.float64 for score in scores.values())
        assert all(torch.isfinite(score) for score in scores.values())
        assert_close(scores["nll"], prediction.nll(case.targets).mean(), 1e-9)
        pooled = case.likelihood.pooled_scores([prediction] * 3, [case.targets] * 3)
        assert not pooled.keys() & scores.keys()
        assert likelihood.step_score_name in scores
        step = case.likelihood.step_score(case.outputs[0], case.targets)
        assert_close(step.double(), case.predict(1).scores(case.targets)[likelihood.step_score_name], 1e-9)

    def test_table_has_a_row_for_every_example(self, likelihood: Likelihood) -> None:
        """Columns of plain values, for files; numpy arrays for arrays."""
        case = _case(likelihood)
        shown = case.predict().in_terms_of(labels=None, is_vector=False, as_numpy=True)
        columns = shown.columns(level=0.9, names=["first", "second"])
        assert columns and all(len(values) == _NUM_EXAMPLES for values in columns.values())
        assert all(isinstance(value, str | int | float) for values in columns.values() for value in values)
        assert isinstance(shown.total_uncertainty, np.ndarray)
        assert len(shown.samples()) == len(case.outputs)

    def test_stored_description_is_in_float64(self, likelihood: Likelihood) -> None:
        """``tensors`` for evaluation files, the same after ``to``."""
        prediction = _case(likelihood).predict()
        described = prediction.tensors()
        assert described and all(value.dtype == torch.float64 for value in described.values())
        assert_close(prediction.to(torch.device("cpu")).tensors(), described, 0.0)

    def test_outputs_are_shared_out_among_targets(self, likelihood: Likelihood) -> None:
        """``num_outputs`` and ``with_outputs`` are inverse; parameters have names of their own and start finite."""
        for num_targets in (1, 2, 4):
            sized = likelihood.with_outputs(likelihood.num_outputs(num_targets))
            assert sized.num_outputs(num_targets) == likelihood.num_outputs(num_targets)
            parameters = sized.initial_parameters()
            assert all(name.startswith("likelihood.") for name in parameters)
            assert all(torch.isfinite(value).all() for value in parameters.values())
        case = _case(likelihood)
        suited = case.likelihood.suited_to(case.targets)
        assert type(suited) is type(likelihood)
        assert torch.isfinite(suited.nll(case.outputs[0], case.targets, suited.initial_parameters())).all()

    def test_json_round_trip(self, likelihood: Likelihood) -> None:
        """A likelihood is a record that saved models can hold."""
        assert_json_round_trip(likelihood)


def _case(likelihood: Likelihood, num_targets: int = 2, seed: int = 0) -> _Case:
    """Three weight samples at five inputs."""
    source = generator(seed)
    if likelihood.target_kind == "classes":
        num_targets = _NUM_CLASSES
        targets = torch.randint(_NUM_CLASSES, (_NUM_EXAMPLES,), generator=source)
    elif likelihood.target_kind == "counts":
        targets = torch.randint(6, (_NUM_EXAMPLES, num_targets), generator=source).double()
    else:
        targets = draw(_NUM_EXAMPLES, num_targets, seed=seed + 1)
    sized = likelihood.with_outputs(likelihood.num_outputs(num_targets))
    outputs = draw(3, _NUM_EXAMPLES, sized.num_outputs(num_targets), seed=seed + 2)
    initial = tree.map(lambda leaf: leaf.double(), sized.initial_parameters())
    return _Case(sized, outputs, targets, tree.add(initial, draw_like(initial, seed + 3, 0.2)) if initial else {})


def _support(case: _Case) -> tuple[Tensor, Tensor]:
    """All classes or counts, or points of the real line, with their weights in a sum that is an integral."""
    kind = case.likelihood.target_kind
    if kind == "classes":
        return torch.arange(_NUM_CLASSES), torch.ones(_NUM_CLASSES, dtype=torch.float64)
    if kind == "counts":
        counts = torch.arange(_LARGEST_COUNT, dtype=torch.float64)
        return counts.unsqueeze(-1), torch.ones_like(counts)
    # y = tan(pi (u - 1/2)), by the midpoint rule in u: heavy tails need the whole line.
    u = (torch.arange(_NUM_POINTS, dtype=torch.float64) + 0.5) / _NUM_POINTS
    values = torch.tan(math.pi * (u - 0.5))
    return values.unsqueeze(-1), math.pi * (1 + values**2) / _NUM_POINTS


def _on_grid(case: _Case, values: Tensor) -> Any:
    """The prediction at the first input, once for every value."""
    outputs = case.outputs[:, :1].expand(-1, len(values), -1)
    return case.likelihood.predict(outputs, case.parameters)
