"""Temperatures that are known."""

import math

import pytest
import torch

from ibaml.likelihoods import ClassPrediction, GaussianComponents, MixturePrediction
from ibaml.train.temperature import fit_temperature, output_temperature


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
    assert output_temperature(predictions, labels) == fit_temperature(predictions, labels) == pytest.approx(3, rel=0.2)
    for num_tasks in (1, 2, 30):
        predictions, labels = classes(num_tasks, 1.0)
        assert fit_temperature(predictions, labels) != 1
        assert output_temperature(predictions, labels) == 1


def test_a_probability_of_zero_says_nothing_of_the_temperature() -> None:
    sure = ClassPrediction(torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]).double().log())
    # The first label has the probability zero at every temperature.
    assert output_temperature([sure, sure], [torch.tensor([0, 1]), torch.tensor([1, 1])]) == 1


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
