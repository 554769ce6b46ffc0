"""Temperatures that are known."""

import math

import pytest
import torch

from ibaml.likelihoods import ClassPrediction, GaussianComponents, MixturePrediction
from ibaml.metrics import estimate
from ibaml.train.temperature import LEAST_TASKS, fit_abstention, fit_temperature, recalibrate


def test_class_probabilities_that_are_too_sure_by_a_known_factor():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 1.5
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    prediction = ClassPrediction(torch.log_softmax(3 * logits, -1).unsqueeze(0))
    temperature = fit_temperature([prediction], [labels])
    # Where the nll is least in the inverse temperature, the mean logit under the prediction is that of the labels.
    probs = prediction.tempered(temperature).probs
    assert float((probs * logits).sum(-1).mean()) == pytest.approx(
        float(logits.gather(1, labels.unsqueeze(1)).mean()), abs=1e-4
    )
    assert temperature == pytest.approx(3, rel=0.1)


def test_gaussian_predictions_have_a_closed_form():
    generator = torch.Generator().manual_seed(1)
    targets = [4 * torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (5, 50)]
    predictions = [
        MixturePrediction(GaussianComponents(torch.zeros(1, len(y), 1).double(), torch.ones(1).double()))
        for y in targets
    ]
    # Each task weighs the same: the variance is the mean over tasks of the mean square.
    expected = math.sqrt(sum(float((y**2).mean()) for y in targets) / 2)
    assert fit_temperature(predictions, targets) == pytest.approx(expected, rel=1e-5)


def test_tempering_keeps_the_mean_and_scales_the_deviation():
    prediction = MixturePrediction(
        GaussianComponents(torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(2)), torch.ones(2))
    )
    sharper = prediction.tempered(0.5)
    torch.testing.assert_close(sharper.mean, prediction.mean)
    torch.testing.assert_close(sharper.total_uncertainty, 0.25 * prediction.total_uncertainty)


def test_nothing_to_calibrate_on():
    with pytest.raises(ValueError, match="calibration needs at least one task"):
        fit_temperature([], [])


def test_tempering_sharpens_what_samples_disagree_on() -> None:
    # Each sample is sure of another class, so that dividing its own logits could not make the average surer.
    sure = torch.tensor([[[0.98, 0.01, 0.01]], [[0.90, 0.05, 0.05]], [[0.01, 0.98, 0.01]]]).double().log()
    prediction = ClassPrediction(sure)
    average = prediction.probs
    for temperature in (0.25, 2.0):
        tempered = prediction.tempered(2 * temperature).tempered(0.5)
        expected = average ** (1 / temperature)
        torch.testing.assert_close(tempered.probs, expected / expected.sum(-1, keepdim=True), rtol=1e-12, atol=0)
        torch.testing.assert_close(tempered.samples(), prediction.samples(), rtol=0, atol=0)
        # Both parts keep their share of the total.
        total = tempered.total_uncertainty
        torch.testing.assert_close(tempered.aleatoric + tempered.epistemic, total, rtol=1e-12, atol=0)
        share = prediction.epistemic / prediction.total_uncertainty
        torch.testing.assert_close(tempered.epistemic / total, share, rtol=1e-12, atol=0)
    certain = ClassPrediction(torch.tensor([[[0.0, -torch.inf]]])).tempered(2.0)
    assert certain.probs.tolist() == [[1.0, 0.0]]
    assert certain.epistemic.tolist() == [0.0]


def classes(num_tasks: int, factor: float) -> tuple[list[ClassPrediction], list[torch.Tensor]]:
    """Predictions whose logits are too large by a factor, and labels."""
    generator = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(num_tasks, 20, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).reshape(num_tasks, 20)
    return [ClassPrediction(torch.log_softmax(factor * one, -1).unsqueeze(0)) for one in logits], list(labels)


def test_a_temperature_is_taken_where_its_gain_is_clear() -> None:
    predictions, labels = classes(30, 3.0)
    found = recalibrate(predictions, labels)
    assert found.temperature == fit_temperature(predictions, labels) == pytest.approx(3, rel=0.2)
    assert found.is_taken and found.gain.low > 0 and str(found).startswith("temperature 1 -> ")
    for num_tasks in (1, 2, 30):
        predictions, labels = classes(num_tasks, 1.0)
        found = recalibrate(predictions, labels)
        assert found.fitted != 1 == found.temperature
    assert "(not clear), on 30 tasks held apart" in repr(found)


def test_few_tasks_know_no_temperature() -> None:
    predictions, labels = classes(LEAST_TASKS, 5.0)
    assert recalibrate(predictions, labels).is_taken
    found = recalibrate(predictions[1:], labels[1:], before=1.7, num_support=[3] * 8 + [5])
    assert found.gain.low > 0 and not found.is_taken and found.temperature == 1.7
    assert str(found) == "temperature stays 1.7: 9 tasks, with 3 to 5 (median 3) known examples; needed are 10"


def gaussians(num_tasks: int) -> tuple[list[MixturePrediction], list[torch.Tensor]]:
    """Predictions of unit variance, and targets whose standard deviation is 2 in one task and 3 in the next."""
    draw = torch.Generator().manual_seed(4)
    targets = [(2 + i % 2) * torch.randn(9, 1, generator=draw, dtype=torch.float64) for i in range(num_tasks)]
    unit = GaussianComponents(torch.zeros(1, 9, 1).double(), torch.ones(1).double())
    return [MixturePrediction(unit)] * num_tasks, targets


def test_the_gain_is_that_of_tasks_on_which_the_temperature_was_not_fitted() -> None:
    predictions, targets = gaussians(24)
    squares = torch.stack([(y**2).mean() for y in targets])

    def nll(variance: torch.Tensor) -> torch.Tensor:
        return 0.5 * (squares / variance + variance.log() + math.log(2 * math.pi))

    fold = torch.arange(24) % 10
    variance = torch.stack([squares[fold != one].mean() for one in fold])
    found = recalibrate(predictions, targets, before=4.0)
    assert found.fitted == pytest.approx(float(squares.mean().sqrt()), rel=1e-5)
    assert found.nll_after.mean == pytest.approx(float(nll(variance).mean()), abs=1e-3)
    assert found.nll_before.mean == pytest.approx(float(nll(torch.tensor(16.0)).mean()), abs=1e-6)
    expected = estimate(nll(torch.tensor(16.0)) - nll(variance))
    assert (found.gain.mean, found.gain.half_width) == pytest.approx((expected.mean, expected.half_width), abs=2e-3)


def test_a_task_that_is_drawn_again_is_no_further_task() -> None:
    predictions, targets = gaussians(12)
    once = recalibrate(predictions, targets)
    sources = [number for number in range(12) for _ in range(5)]
    again = recalibrate([predictions[one] for one in sources], [targets[one] for one in sources], sources=sources)
    assert again.num_tasks == 12 and again.fitted == pytest.approx(once.fitted, rel=1e-6)
    assert again.gain.half_width == pytest.approx(once.gain.half_width, rel=1e-6)
    predictions, labels = classes(6, 1.0)
    curve = fit_abstention(predictions, labels)
    repeated = fit_abstention(5 * predictions, 5 * labels, sources=5 * [*range(6)])
    naive = fit_abstention(5 * predictions, 5 * labels)
    assert float(naive.error_bound[0]) < float(repeated.error_bound[0])
    assert float(repeated.error_bound[0]) == pytest.approx(float(curve.error_bound[0]), rel=0.1)


def test_a_probability_of_zero_says_nothing_of_the_temperature() -> None:
    sure = ClassPrediction(torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]).double().log())
    # The first label has the probability zero at every temperature.
    found = recalibrate([sure] * 10, [torch.tensor([0, 1]), torch.tensor([1, 1])] * 5)
    assert found.temperature == 1


def test_temperatures_far_from_one_are_found_and_perfect_predictions_do_not_run_away() -> None:
    predictions, labels = classes(40, 0.01)
    assert fit_temperature(predictions, labels) == pytest.approx(0.01, rel=0.2)
    predictions, labels = classes(40, 200.0)
    assert fit_temperature(predictions, labels) == pytest.approx(200, rel=0.2)
    right = ClassPrediction(torch.tensor([[[0.9, 0.1]]]).double().log())
    assert 1 / 40 < fit_temperature([right], [torch.tensor([0])]) < 1 / 10


def test_tasks_of_unequal_numbers_of_classes_have_the_same_weight() -> None:
    two = ClassPrediction(torch.tensor([[[0.7, 0.3], [0.7, 0.3], [0.7, 0.3]]]).double().log())
    three = ClassPrediction(torch.tensor([[[0.6, 0.3, 0.1]]]).double().log())
    targets = [torch.tensor([0, 0, 1]), torch.tensor([1])]
    temperature = fit_temperature([two, three], targets)

    def loss(temperature: float) -> float:
        of_tasks = zip((two, three), targets, strict=True)
        return sum(float(one.tempered(temperature).nll(target).mean()) for one, target in of_tasks)

    assert loss(temperature) < min(loss(0.98 * temperature), loss(1.02 * temperature))
