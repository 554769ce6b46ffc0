import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from ibaml import MetaLearner
from ibaml.data.ragged import TaskSplits
from ibaml.learner import defaults, hierarchical
from ibaml.learner.hierarchies import Curves, LearnedCurves, Lines, estimate, wider
from ibaml.learner.run_folder import ENVIRONMENT, README
from ibaml.networks import MLP, RadialBasis
from ibaml.networks.radial_basis import radial_features
from ibaml.optional import require
from ibaml.train import TrainerSettings
from ibaml.train.hierarchical import in_one
from ibaml.types import Batch


def tasks(curve, num_tasks=24, *, num_rows=12, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_tasks):
        x = rng.uniform(-3, 3, (num_rows, 1))
        found.append((x, curve(x[:, 0], rng) + noise * rng.normal(size=num_rows)))
    return found


def lines(x, rng):
    return 3 + rng.normal() + (1 + rng.normal()) * x


def bent(x, rng):
    return 2 * np.sin(2 * x) + rng.normal()


def waves(x, rng):
    return rng.normal() * np.sin(2 * x) + rng.normal() * np.cos(2 * x)


def root_mean_square(learner, test, num_known=4):
    errors = [learner.adapt(x[:num_known], y[:num_known]).predict(x[num_known:]).mean - y[num_known:] for x, y in test]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def test_the_line_is_the_mixed_model_of_statsmodels():
    """Estimates by REML of the same model; hyper-priors and the tolerance leave a few parts in a thousand."""
    mixed = require("statsmodels.regression.mixed_linear_model", "statsmodels", "experiments").MixedLM
    data = tasks(lines, 40, noise=0.5)
    y = np.concatenate([y for _, y in data])
    # In the units in which hyper-priors are stated.
    data = [(x, (own - y.mean()) / y.std()) for x, own in data]
    groups = in_one([Batch(torch.from_numpy(x), torch.from_numpy(own)[:, None]) for x, own in data])
    found = estimate(Lines(num_inputs=1, num_targets=1, correlated=True), groups, most_steps=100)
    design = np.concatenate([np.column_stack([x, np.ones(len(x))]) for x, _ in data])
    names = np.repeat(np.arange(len(data)), [len(own) for _, own in data])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = mixed(np.concatenate([own for _, own in data]), design, groups=names, exog_re=design).fit(reml=True)
    mean, covariance = (part[0].numpy() for part in found.restricted.common_weights())
    np.testing.assert_allclose(mean, expected.fe_params, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(covariance, np.asarray(expected.cov_params())[:2, :2], rtol=0.1, atol=1e-3)
    assert float(torch.exp(found.parameters["log_noise"])) == pytest.approx(expected.scale, rel=0.02)
    factor = found.hierarchy.factor(found.parameters)[0].numpy()
    np.testing.assert_allclose(factor @ factor.T, expected.cov_re, rtol=0.05, atol=0.02)


def test_a_new_group_is_as_uncertain_as_the_others_leave_it():
    groups = in_one([Batch(torch.from_numpy(x), torch.from_numpy(y)[:, None]) for x, y in tasks(lines, 8)])
    found = estimate(Lines(num_inputs=1, num_targets=1, correlated=True), groups, most_steps=100)
    factor, (mean, uncertainty) = found.hierarchy.factor(found.parameters), found.restricted.common_weights()
    expected = wider(7) * factor @ factor.mT + uncertainty
    for one, other in zip(found.new_group(), (mean, expected), strict=True):
        torch.testing.assert_close(one, other)
    of_each = found.new_group_without_each()[1]
    assert of_each.shape == (1, 8, 2, 2) and bool((torch.diagonal(of_each[0], dim1=-2, dim2=-1) > 0).all())


@pytest.mark.parametrize(
    ("curve", "chosen", "network", "error"),
    [
        (lines, defaults.CORRELATED, MLP, 0.2),
        (bent, defaults.CURVES, RadialBasis, 0.35),
        # With 24 groups no more than smoothness is learned of them.
        (waves, defaults.CURVES, RadialBasis, 0.9),
    ],
)
def test_left_out_groups_choose(curve, chosen, network, error):
    learner = MetaLearner(likelihood="gaussian").fit(tasks(curve))
    assert learner.choice.name == chosen
    assert learner.choice.nll[learner.choice.name] <= min(learner.choice.nll.values()) + 0.2
    assert isinstance(learner.network, network)
    assert root_mean_square(learner, tasks(curve, 30, seed=1)) < error


def test_with_many_groups_a_covariance_of_all_weights_is_learned():
    """Waves of unknown phase are two-dimensional: four rows tell them, which smoothness alone does not."""
    learner = MetaLearner(likelihood="gaussian").fit(tasks(waves, 80))
    assert learner.choice.name == defaults.LEARNED_CURVES
    assert learner.choice.nll[defaults.LEARNED_CURVES] < learner.choice.nll[defaults.CURVES] - 0.3
    assert root_mean_square(learner, tasks(waves, 60, seed=1)) < 0.2


def test_the_head_predicts_what_was_estimated():
    """Float32 and the units of the data between the two."""
    data = tasks(bent)
    learner = MetaLearner(likelihood="gaussian").fit(data)
    x, y = data[0]
    scales = learner.preprocessing
    mean, scale = float(scales.targets.mean), float(scales.targets.scale)
    batch = [
        Batch(torch.from_numpy(scales.inputs.transform(own)), torch.from_numpy((of - mean) / scale)[:, None])
        for own, of in data
    ]
    solved = hierarchical.fit_hierarchical(
        _splits(batch), _suited(data), scale=scales.targets.scale, most_steps=200, seed=0
    )
    family = solved.suited.network
    z = torch.cat([_features(family, batch[0].x), torch.ones(len(x), 1).double()], 1)
    prior, noise = solved.meta.prior, torch.exp(solved.meta.shared["likelihood.log_noise_variance"])
    factor = prior.factor()[0]
    whole = z @ factor @ factor.T @ z.T + noise * torch.eye(len(x)).double()
    gain = whole[4:, :4] @ torch.linalg.inv(whole[:4, :4])
    error = batch[0].y[:4, 0] - z[:4] @ prior.mean[0]
    expected = z[4:] @ prior.mean[0] + gain @ error
    variance = torch.diagonal(whole[4:, 4:] - gain @ whole[:4, 4:])
    found = learner.adapt(x[:4], y[:4]).predict(x[4:])
    np.testing.assert_allclose(found.mean, mean + scale * expected.detach().numpy(), rtol=0, atol=2e-3)
    np.testing.assert_allclose(found.total_uncertainty, scale**2 * variance.detach().numpy(), rtol=2e-2)


def _splits(batches):
    return TaskSplits(batches, num_outputs=1)


def _suited(data):
    learner = MetaLearner(likelihood="gaussian").fit(data, num_steps=1)
    return defaults.Suited(learner.network, learner.algorithm, learner.likelihood, learner.adapt_patterns)


def _features(network, x):
    with torch.no_grad():
        return torch.cat([radial_features(x, network.centres.double(), network.log_length_scale.double()), x], 1)


def test_several_targets_have_a_model_each():
    rng = np.random.default_rng(0)
    data = []
    for _ in range(20):
        x = rng.uniform(-2, 2, (10, 1))
        both = np.column_stack([rng.normal() + 3 * x[:, 0], rng.normal() - 100 * x[:, 0]])
        data.append((x, both + np.array([0.1, 5.0]) * rng.normal(size=both.shape)))
    learner = MetaLearner(likelihood="gaussian").fit(data)
    found = learner.adapt(data[0][0][:3], data[0][1][:3]).predict(np.array([[1.5]]))
    assert found.mean.shape == (1, 2)
    np.testing.assert_allclose(np.sqrt(found.aleatoric[0]), [0.1, 5.0], rtol=0.15)


def test_many_rows_are_thinned_and_still_all_of_them_tell_the_common_weights(monkeypatch):
    data = tasks(bent, 30, num_rows=40)
    monkeypatch.setattr(hierarchical, "_MOST_ROWS", 100)
    learner = MetaLearner(likelihood="gaussian").fit(data)
    assert root_mean_square(learner, tasks(bent, 30, seed=1)) < 0.35
    monkeypatch.setattr(hierarchical, "_MOST_ENTRIES", 1)
    assert MetaLearner(likelihood="gaussian").fit(tasks(lines, 6, num_rows=100)).choice.num_tasks == 6


def test_validation_tasks_fit_the_output_temperature_and_nothing_else(tmp_path):
    train, validation = tasks(lines), tasks(lines, 12, seed=5)
    plain = MetaLearner(likelihood="gaussian").fit(train)
    learner = MetaLearner(likelihood="gaussian").fit(train, validation, run_folder=tmp_path)
    torch.testing.assert_close(learner.meta_parameters.prior.mean, plain.meta_parameters.prior.mean)
    assert np.isfinite(learner.training_result.chosen.nll) and learner.training_result.num_steps > 1
    assert plain.training_result.chosen.nll == np.inf and plain.calibration_temperature == 1
    assert (tmp_path / ENVIRONMENT).exists() and "linear_gaussian" in (tmp_path / README).read_text()
    x, y = train[0]
    first, second = (one.adapt(x[:3], y[:3]).predict(x) for one in (learner, MetaLearner.load(tmp_path)))
    np.testing.assert_array_equal(first.mean, second.mean)


def test_settings_of_ones_own_train_the_chosen_model_by_steps():
    learner = MetaLearner(likelihood="gaussian").fit(tasks(bent), settings=TrainerSettings(num_steps=3))
    assert learner.choice.name == defaults.CURVES and learner.training_result.num_steps == 3
    assert isinstance(learner.network, RadialBasis)


def test_a_student_t_is_as_wide_as_its_quantile_says():
    assert wider(6) == pytest.approx((stats.t(6).ppf(0.95) / stats.norm.ppf(0.95)) ** 2, rel=1e-12)
    assert wider(0) == wider(1)


def test_learned_covariances_start_at_that_of_the_curves():
    curves = Curves(
        lines=Lines(num_inputs=1, num_targets=1, correlated=True),
        centres=torch.linspace(-1, 1, 4, dtype=torch.float64).unsqueeze(1),
        length_scale=1.0,
    )
    start = curves.start()
    learned = LearnedCurves(curves=curves, hyper_parameters=start)
    torch.testing.assert_close(learned.factor(learned.start()), curves.factor(start))
    torch.testing.assert_close(learned.precision(learned.start()), curves.precision(start))
    # Where the inverse Wishart density is highest.
    point = {name: value.clone().requires_grad_() for name, value in learned.start().items()}
    (slope,) = torch.autograd.grad(learned.penalty(point), [point["log_scale"]])
    torch.testing.assert_close(slope, torch.zeros_like(slope))
