"""Predictions against torch.distributions and sums written out."""

import dataclasses
import math
import statistics

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions

from ibaml.likelihoods import Categorical, ClassPrediction, GaussianComponents, MixturePrediction

ALGEBRA = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(num_samples: int = 5, num_examples: int = 4, num_classes: int = 3, seed: int = 0) -> ClassPrediction:
    return ClassPrediction(torch.log_softmax(3 * draw(num_samples, num_examples, num_classes, seed=seed), -1))


def regression(num_samples: int = 5, num_examples: int = 4, num_outputs: int = 2, seed: int = 0) -> MixturePrediction:
    return gaussians(draw(num_samples, num_examples, num_outputs, seed=seed), draw(num_outputs).exp())


def gaussians(means: torch.Tensor, noise_variance: torch.Tensor) -> MixturePrediction:
    return MixturePrediction(GaussianComponents(means, noise_variance))


def test_class_probabilities_are_averages():
    prediction = classes()
    probs = prediction.sample_log_probs.exp()
    torch.testing.assert_close(prediction.probs, sum(probs) / 5, **ALGEBRA)
    torch.testing.assert_close(prediction.log_probs, (sum(probs) / 5).log(), **ALGEBRA)
    torch.testing.assert_close(prediction.samples(), probs, **ALGEBRA)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(4, dtype=torch.float64), **ALGEBRA)


def test_class_uncertainties_against_torch_distributions():
    prediction = classes()
    total = distributions.Categorical(probs=prediction.samples().mean(0)).entropy()
    aleatoric = distributions.Categorical(probs=prediction.samples()).entropy().mean(0)
    torch.testing.assert_close(prediction.total_uncertainty, total, **ALGEBRA)
    torch.testing.assert_close(prediction.aleatoric, aleatoric, **ALGEBRA)
    torch.testing.assert_close(prediction.epistemic, total - aleatoric, **ALGEBRA)


def test_epistemic_uncertainty_is_the_mean_divergence_from_the_average():
    """Mutual information as ``mean_s KL(p_s || p)``, another formula than total minus aleatoric."""
    prediction = classes()
    probs, mean = prediction.samples(), prediction.samples().mean(0)
    divergence = (probs * (probs / mean).log()).sum(-1).mean(0)
    torch.testing.assert_close(prediction.epistemic, divergence, **ALGEBRA)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10**6))
def test_class_uncertainties_add_up_and_stay_in_range(num_samples, num_classes, seed):
    prediction = classes(num_samples, 3, num_classes, seed)
    torch.testing.assert_close(prediction.total_uncertainty, prediction.aleatoric + prediction.epistemic, **ALGEBRA)
    assert bool((prediction.epistemic >= 0).all()) and bool((prediction.aleatoric >= 0).all())
    assert bool((prediction.total_uncertainty <= math.log(num_classes) + 1e-12).all())
    assert bool((prediction.epistemic <= math.log(num_samples) + 1e-12).all())


def test_known_class_uncertainties():
    """Two certain samples that disagree: all is epistemic. Two that agree to know nothing: all is aleatoric."""
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64).log()
    prediction = ClassPrediction(sure)
    assert prediction.total_uncertainty.item() == pytest.approx(math.log(2), abs=1e-12)
    assert prediction.aleatoric.item() == 0 and prediction.epistemic.item() == pytest.approx(math.log(2), abs=1e-12)
    ignorant = ClassPrediction(torch.full((2, 1, 2), 0.5, dtype=torch.float64).log())
    assert ignorant.aleatoric.item() == pytest.approx(math.log(2), abs=1e-12) and ignorant.epistemic.item() == 0


def test_class_nll():
    prediction, targets = classes(), torch.tensor([0, 2, 1, 1])
    expected = -prediction.probs[torch.arange(4), targets].log()
    torch.testing.assert_close(prediction.nll(targets), expected, **ALGEBRA)


def test_confident_samples_keep_their_tail():
    """Averages are taken of logarithms: probabilities far below the smallest float32 still have an nll."""
    prediction = ClassPrediction(torch.log_softmax(torch.tensor([[[0.0, -500.0]], [[0.0, -501.0]]]), -1))
    assert prediction.nll(torch.tensor([1])).item() == pytest.approx(500 - math.log((1 + math.exp(-1)) / 2), rel=1e-6)


def test_regression_moments_against_a_mixture():
    prediction = regression()
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(4, 2, 5, dtype=torch.float64)),
        distributions.Normal(
            prediction.components.mean.permute(1, 2, 0), prediction.components.aleatoric.sqrt().reshape(1, 2, 1)
        ),
    )
    torch.testing.assert_close(prediction.mean, mixture.mean, **ALGEBRA)
    torch.testing.assert_close(prediction.total_uncertainty, mixture.variance, **ALGEBRA)
    torch.testing.assert_close(prediction.samples(), prediction.components.mean)


def test_regression_uncertainties():
    prediction = regression()
    means = prediction.components.mean
    torch.testing.assert_close(prediction.epistemic, ((means - means.mean(0)) ** 2).mean(0), **ALGEBRA)
    torch.testing.assert_close(
        prediction.aleatoric, torch.ones(4, 1, dtype=torch.float64) * prediction.components.aleatoric
    )
    torch.testing.assert_close(prediction.total_uncertainty, prediction.aleatoric + prediction.epistemic, **ALGEBRA)
    single = regression(num_samples=1)
    assert bool((single.epistemic == 0).all())
    torch.testing.assert_close(single.total_uncertainty, single.aleatoric)


def test_regression_nll_is_of_the_joint_mixture():
    """Outputs are independent given the weights only, so the mixture is over their joint density."""
    prediction, targets = regression(), draw(4, 2, seed=9)
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(4, 5, dtype=torch.float64)),
        distributions.Independent(
            distributions.Normal(prediction.components.mean.transpose(0, 1), prediction.components.aleatoric.sqrt()), 1
        ),
    )
    torch.testing.assert_close(prediction.nll(targets), -mixture.log_prob(targets), **ALGEBRA)


# Quantiles of the mixture


def test_quantiles_against_a_root_finder():
    generator = torch.Generator().manual_seed(5)
    means = 3 * torch.randn(7, 4, 2, generator=generator, dtype=torch.float64)
    variance = torch.tensor([0.3, 2.0], dtype=torch.float64)
    prediction = gaussians(means, variance)
    for probability in (0.001, 0.05, 0.5, 0.9, 0.999):
        found = prediction.quantile(probability)
        for example in range(4):
            for output in range(2):
                parts = scipy.stats.norm(means[:, example, output].numpy(), float(variance[output]) ** 0.5)

                def excess(q, parts=parts, probability=probability):
                    return parts.cdf(q).mean() - probability

                assert float(found[example, output]) == pytest.approx(scipy.optimize.brentq(excess, -60, 60), abs=1e-9)


def test_cdf_is_that_of_the_mixture_and_the_inverse_of_the_quantile():
    prediction = gaussians(3 * draw(7, 4, 2, seed=5), torch.tensor([0.3, 2.0], dtype=torch.float64))
    targets = draw(4, 2, seed=6)
    parts = scipy.stats.norm(prediction.components.mean.numpy(), prediction.components.aleatoric.sqrt().numpy())
    torch.testing.assert_close(prediction.cdf(targets), torch.from_numpy(parts.cdf(targets.numpy()).mean(0)), **ALGEBRA)
    for probability in (0.01, 0.5, 0.97):
        found = prediction.cdf(prediction.quantile(probability))
        torch.testing.assert_close(found, torch.full_like(found, probability))


def test_intervals_cover_what_they_promise():
    generator = torch.Generator().manual_seed(6)
    means = torch.randn(5, 1, 1, generator=generator, dtype=torch.float64) * 2
    prediction = gaussians(means, torch.tensor([0.5], dtype=torch.float64))
    draws = means[torch.randint(5, (40_000,), generator=generator), 0, 0]
    draws = draws + 0.5**0.5 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    for level in (0.5, 0.9):
        low, high = (float(end) for end in prediction.interval(level))
        share = float(((draws > low) & (draws < high)).double().mean())
        assert abs(share - level) < 5 * (level * (1 - level) / 40_000) ** 0.5


def test_single_gaussian_interval_is_the_textbook_one():
    prediction = gaussians(torch.zeros(1, 3, 1, dtype=torch.float64), torch.tensor([4.0]).double())
    low, high = prediction.interval(0.95)
    torch.testing.assert_close(high, torch.full((3, 1), 2 * scipy.stats.norm.ppf(0.975), dtype=torch.float64))
    torch.testing.assert_close(low, -high)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5])
def test_quantiles_and_levels_out_of_range(value):
    prediction = gaussians(torch.zeros(1, 1, 1), torch.ones(1))
    with pytest.raises(ValueError, match="probability is .*; expected a number strictly between 0 and 1"):
        prediction.quantile(value)
    with pytest.raises(ValueError, match="level is .*; expected a probability strictly between 0 and 1"):
        prediction.interval(value)


def test_labels_are_the_most_probable_classes():
    prediction = ClassPrediction(torch.log(torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.3, 0.7], [0.2, 0.8]]])))
    assert prediction.labels.tolist() == [0, 1]


def test_rescaling_is_that_of_the_targets():
    generator = torch.Generator().manual_seed(7)
    prediction = gaussians(torch.randn(3, 4, 2, generator=generator).double(), torch.tensor([0.5, 2.0]).double())
    mean, scale = torch.tensor([1e9, -1.0]).double(), torch.tensor([10.0, 0.1]).double()
    y = torch.randn(4, 2, generator=generator).double()
    moved = prediction.rescaled(mean, scale)
    torch.testing.assert_close(moved.nll(y * scale + mean), prediction.nll(y) + scale.log().sum(), rtol=1e-6, atol=1e-6)


# None of these, and abstention


def scored(num_samples: int = 5) -> ClassPrediction:
    return Categorical().predict(3 * draw(num_samples, 4, 3), {})


def test_out_of_task_score_written_out():
    logits = 3 * draw(5, 4, 3)
    for i, found in enumerate(Categorical().predict(logits, {}).out_of_task.tolist()):
        centred = [[float(f - sample.mean()) for f in sample] for sample in logits[:, i]]
        variance = sum(statistics.pvariance([sample[c] for sample in centred]) for c in range(3)) / 3
        assert found == pytest.approx(math.log(variance) - float(logits[:, i].mean(0).max()), abs=1e-10)


def test_out_of_task_score_of_one_sample_is_minus_the_largest_logit():
    logits = torch.tensor([[[5.0, 0.0], [1.0, 0.5], [-3.0, -4.0]]])
    assert Categorical().predict(logits, {}).out_of_task.tolist() == [-5.0, -1.0, 3.0]
    # Samples that agree have no variance; the order is still that of the logits.
    agreeing = Categorical().predict(logits.expand(3, 3, 2), {}).out_of_task
    assert torch.isfinite(agreeing).all() and agreeing.argsort().tolist() == [0, 1, 2]


def test_out_of_task_grows_as_samples_disagree_and_as_logits_fall():
    logits = draw(6, 4, 3)
    mean = logits.mean(0)
    scores = [Categorical().predict(mean + s * (logits - mean), {}).out_of_task for s in (0.5, 1.0, 2.0)]
    assert (scores[0] < scores[1]).all() and (scores[1] < scores[2]).all()
    assert (Categorical().predict(logits - 1, {}).out_of_task > scores[1]).all()


def test_out_of_task_survives_what_is_done_to_a_prediction():
    prediction = scored()
    score = prediction.out_of_task
    named = prediction.tempered(3.0).in_terms_of(labels=np.array(["a", "b", "c"]), is_vector=False, as_numpy=True)
    assert isinstance(named.out_of_task, np.ndarray) and named.out_of_task.tolist() == score.tolist()
    moved = prediction.to(torch.device("cpu"))
    assert torch.equal(moved.tensors()["out_of_task"], score) and moved.tensors()["out_of_task"].dtype == torch.float64
    assert named.columns(level=0.9, names=())["out_of_task"] == score.tolist()


def test_probabilities_alone_do_not_tell_what_is_foreign():
    prediction = classes()
    with pytest.raises(ValueError, match="made of probabilities alone, which have no out-of-task score"):
        _ = prediction.out_of_task
    assert "out_of_task" not in prediction.tensors()
    assert "out_of_task" not in prediction.columns(level=0.9, names=())


def test_abstaining_leaves_labels_as_they_are():
    prediction = ClassPrediction(torch.log(torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]], dtype=torch.float64)))
    assert prediction.abstains.tolist() == [False] * 3 and "abstains" not in prediction.columns(level=0.9, names=())
    torch.testing.assert_close(prediction.confidence, torch.tensor([0.9, 0.6, 0.5], dtype=torch.float64))
    careful = dataclasses.replace(prediction, min_confidence=0.55)
    assert careful.abstains.dtype == torch.bool and careful.abstains.tolist() == [False, False, True]
    assert torch.equal(careful.labels, prediction.labels)
    # Confidence is that of the tempered probabilities.
    assert careful.tempered(5.0).abstains.tolist() == [False, True, True]
    named = careful.in_terms_of(labels=np.array(["no", "yes"]), is_vector=False, as_numpy=True)
    assert named.labels[~named.abstains].tolist() == ["no", "yes"]
    assert named.columns(level=0.9, names=())["abstains"] == [False, False, True]
    assert dataclasses.replace(prediction, min_confidence=math.inf).abstains.all()


def test_log_prob_is_minus_the_nll_in_the_terms_of_the_data():
    labels = np.array(["a", "b", "c"])
    named = classes().in_terms_of(labels=labels, is_vector=False, as_numpy=True)
    np.testing.assert_allclose(named.log_prob(["c", "a", "b", "b"]), named.log_probs[range(4), [2, 0, 1, 1]])
    single = regression(num_samples=1, num_outputs=1).in_terms_of(labels=None, is_vector=True, as_numpy=True)
    y = np.array([0.5, -1.0, 2.0, 0.0])
    expected = scipy.stats.norm(single.mean, single.standard_deviation).logpdf(y)
    np.testing.assert_allclose(single.log_prob(y), expected, rtol=1e-12)
    np.testing.assert_allclose(single.log_prob(pd.Series(y, index=list("wxyz"))), expected, rtol=1e-12)


def test_frames_have_the_columns_of_files():
    single = regression(num_outputs=1).in_terms_of(labels=None, is_vector=True, as_numpy=True)
    frame = single.to_frame(level=0.8, index=list("wxyz"))
    assert list(frame) == ["predicted", "lower_80", "upper_80", "noise_std", "epistemic_std"]
    assert frame.index.tolist() == list("wxyz")
    np.testing.assert_array_equal(frame.predicted, single.mean)
    np.testing.assert_array_equal(frame[["lower_80", "upper_80"]].T, single.interval(0.8))
    np.testing.assert_allclose(frame.noise_std**2 + frame.epistemic_std**2, single.total_uncertainty)
    two = regression()
    assert list(two.to_frame(names=["height", "weight"]))[:2] == ["predicted_height", "lower_90_height"]
    np.testing.assert_array_equal(two.to_frame()["predicted_1"], two.mean[:, 1])
    named = classes().in_terms_of(labels=np.array(["a", "b", "c"]), is_vector=False, as_numpy=True)
    frame = named.to_frame()
    assert list(frame) == ["predicted", *(f"probability_{name}" for name in "abc"), "entropy", "epistemic"]
    assert frame.predicted.tolist() == named.labels.tolist()
    np.testing.assert_array_equal(frame.epistemic, named.epistemic)


def test_predictions_show_themselves_in_a_line():
    means = torch.tensor([[[1.0], [250.0]]], dtype=torch.float64)
    numbers = gaussians(means, torch.ones(1, dtype=torch.float64))
    assert repr(numbers) == "MixturePrediction(2 rows: mean 1 to 250; 90% intervals 3.29 wide)"
    assert repr(numbers) == repr(numbers.in_terms_of(labels=None, is_vector=True, as_numpy=True))
    logits = torch.tensor([[[0.0, 0.0, 3.0], [0.0, 0.0, 4.0], [5.0, 0.0, 0.0]]], dtype=torch.float64)
    three = ClassPrediction(torch.log_softmax(logits, -1))
    assert repr(three) == "ClassPrediction(3 rows: 1 x 0, 2 x 2; confidence 0.909 to 0.987)"
    named = three.in_terms_of(labels=np.array(["a", "b", "c"]), is_vector=False, as_numpy=True)
    assert repr(named) == "ClassPrediction(3 rows: 1 x a, 2 x c; confidence 0.909 to 0.987)"
    many = ClassPrediction(torch.log_softmax(9 * torch.eye(9)[None], -1))
    assert "1 x 5, ...; confidence 0.999)" in repr(many)
    assert repr(ClassPrediction(torch.zeros(1, 0, 2))) == "ClassPrediction(0 rows)"
    assert repr(gaussians(torch.zeros(1, 0, 1), torch.ones(1))) == "MixturePrediction(0 rows)"


def test_predictions_of_tasks_with_classes_of_their_own_are_joined():
    parts = [
        classes(num_classes=number, num_examples=2, seed=number).in_terms_of(
            labels=np.array(list(labels)), is_vector=False, as_numpy=True
        )
        for number, labels in ((2, "ca"), (3, "bde"))
    ]
    whole = ClassPrediction.joined(parts, [torch.tensor([3, 0]), torch.tensor([1, 2])])
    assert whole.classes.tolist() == list("abcde")
    expected = np.zeros((4, 5))
    expected[np.ix_([3, 0], [2, 0])], expected[np.ix_([1, 2], [1, 3, 4])] = (part.probs for part in parts)
    np.testing.assert_allclose(whole.probs, expected, rtol=1e-12)
    np.testing.assert_allclose(whole.epistemic[[3, 0]], parts[0].epistemic, rtol=1e-10)
    other = dataclasses.replace(parts[0], sample_log_probs=parts[0].sample_log_probs[:3])
    with pytest.raises(ValueError, match="tasks have predictions of 3 and 5 samples, which cannot be joined: set num"):
        ClassPrediction.joined([other, parts[1]], [torch.tensor([0, 1]), torch.tensor([2, 3])])


def test_labels_of_different_kinds_are_different_classes():
    parts = [
        classes(num_classes=2, num_examples=1, seed=seed).in_terms_of(labels=labels, is_vector=False, as_numpy=True)
        for seed, labels in enumerate((np.array([1, 2]), np.array(["1", "b"])))
    ]
    whole = ClassPrediction.joined(parts, [torch.tensor([0]), torch.tensor([1])])
    assert whole.classes.tolist() == [1, 2, "1", "b"]
    np.testing.assert_allclose(whole.probs[0], [*parts[0].probs[0], 0, 0], rtol=1e-12)
    np.testing.assert_allclose(whole.probs[1], [0, 0, *parts[1].probs[0]], rtol=1e-12)
    assert type(whole.labels[0]) is int and type(whole.labels[1]) is str
    numbers = [parts[0], dataclasses.replace(parts[1], classes=np.array([1.0, 2.5]))]
    assert ClassPrediction.joined(numbers, [torch.tensor([0]), torch.tensor([1])]).classes.tolist() == [1.0, 2.0, 2.5]
