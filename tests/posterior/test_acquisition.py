"""What a measurement would tell, against measuring: updates with any outcome, and quadrature over the weights."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml import MetaLearner
from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.algorithms.heads import GaussianClasses
from ibaml.algorithms.heads.gaussian import JointMoments
from ibaml.algorithms.heads.gaussian_classes import GaussianClassesPrior
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.posterior.acquisition import by_variance
from ibaml.train import TrainerSettings
from ibaml.types import Batch

ONE_STEP = TrainerSettings(num_steps=1, tasks_per_step=2)
HEADS = {
    "fewer weights": ("linear_gaussian", {"prior": "full"}, 9),
    "fewer examples": ("linear_gaussian", {}, 2),
    "at a temperature": ("linear_gaussian", {"temperature": 0.3}, 9),
    "process": ("gp", {}, 6),
}


def pairs(num_targets: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    tasks = []
    for _ in range(4):
        x = rng.normal(size=(16, 2))
        y = (
            50
            + 7 * x @ rng.normal(size=(2, num_targets)) * 10.0 ** np.arange(num_targets)
            + rng.normal(size=(16, num_targets))
        )
        tasks.append((x, y[:, 0] if num_targets == 1 else y))
    return tasks


def fitted(algorithm: Algorithm, num_targets: int = 1) -> MetaLearner:
    network = MLP(num_targets, input_shape=2, hidden_sizes=(5,), generator=torch.Generator().manual_seed(0)).double()
    likelihood = Gaussian(num_targets=num_targets, initial_noise_variance=0.2)
    return MetaLearner(network, algorithm, likelihood).fit(pairs(num_targets), settings=ONE_STEP)


@pytest.mark.parametrize("name", HEADS)
def test_gains_are_what_updates_bring_whatever_the_outcomes(name: str) -> None:
    algorithm, settings, num_known = HEADS[name]
    learner = fitted(make_algorithm(algorithm, **settings))
    x, y = pairs()[1]
    posterior = learner.adapt(x[:num_known], y[:num_known])
    candidates, asked = x[9:13], x[12:]
    found = posterior.acquisition(candidates, 3, of=asked)

    def variance(*rows: int) -> float:
        outcomes = np.random.default_rng(len(rows)).normal(50, 30, size=len(rows))
        # One after the other and at once are the same.
        return posterior.update(candidates[list(rows)], outcomes).predict(asked).epistemic.mean()

    before = posterior.predict(asked).epistemic.mean()
    by_itself = [before - variance(row) for row in range(4)]
    np.testing.assert_allclose(found.scores, by_itself, rtol=1e-10)
    chosen = [int(np.argmax(by_itself))]
    gains = [max(by_itself)]
    for _ in range(2):
        rest = [row for row in range(4) if row not in chosen]
        last = variance(*chosen)
        each = [last - variance(*chosen, row) for row in rest]
        chosen.append(rest[int(np.argmax(each))])
        gains.append(max(each))
    assert found.positions.tolist() == chosen
    np.testing.assert_allclose(found.gains, gains, rtol=1e-8)
    # Of the candidates themselves.
    own = posterior.acquisition(candidates)
    best = int(own.positions[0])
    after = posterior.update(candidates[[best]], [0.0]).predict(candidates).epistemic
    expected = (posterior.predict(candidates).epistemic - after).mean()
    np.testing.assert_allclose([own.gains[0], own.scores.max()], expected, rtol=1e-10)


def test_of_several_targets_each_counts_in_its_spread() -> None:
    """The second target has ten times the unit of the first; calibration multiplies all deviations."""
    learner = fitted(make_algorithm("linear_gaussian", prior="full"), num_targets=2)
    learner = learner.with_fitted(dataclasses.replace(learner.fitted_model, temperature=1.5))
    x, y = pairs(2)[1]
    posterior = learner.adapt(x[:5], y[:5])
    found = posterior.acquisition(x[5:9], of=x[9:])
    scale = learner.preprocessing.targets.scale.numpy()
    assert scale[1] > 3 * scale[0]
    for row, score in enumerate(found.scores):
        after = posterior.update(x[[5 + row]], [[0.0, 0.0]]).predict(x[9:]).epistemic
        reduction = (posterior.predict(x[9:]).epistemic - after) / scale**2
        assert score == pytest.approx(reduction.sum(1).mean(), rel=1e-10)


def test_several_rows_are_not_all_of_one_kind() -> None:
    """Two near candidates far out: by themselves the best two, together hardly better than one."""
    learner = fitted(make_algorithm("gp"))
    posterior = learner.adapt(*(part[:3] for part in pairs()[0]))
    candidates = np.array([[4.0, 4.0], [4.0, 4.0001], [-3.0, 3.0], [0.0, 0.0]])
    found = posterior.acquisition(candidates, 2)
    assert set(np.argsort(-found.scores)[:2]) == {0, 1}
    assert len({0, 1} & set(found.positions.tolist())) == 1 and 2 in found.positions


def test_gains_are_never_negative_and_end_where_all_is_known() -> None:
    """Without noise and with more measurements than the rank of the covariance."""
    factor = torch.randn(1, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = JointMoments(
        torch.zeros(1, 5, dtype=torch.float64), factor @ factor.mT, torch.zeros(1, dtype=torch.float64)
    )
    found = by_variance(moments, 5, 5)
    total = torch.diagonal(moments.covariance[0]).mean()
    torch.testing.assert_close(found.gains[:2].sum(), total, rtol=1e-10, atol=0)
    assert sorted(found.positions.tolist()) == [0, 1, 2, 3, 4] and (found.gains[2:].abs() < 1e-12).all()


def test_tables_keep_their_index_and_tensors_stay_tensors() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"group": np.repeat(list("abcd"), 8), "a": rng.normal(size=32), "b": rng.normal(size=32)})
    table["y"] = 3 * table.a + rng.normal(size=32)
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian").fit(
        table, task="group", target="y", num_steps=1
    )
    posterior = learner.adapt(table[:4], table.y[:4])
    candidates = table[20:26].rename(index=lambda row: f"row {row}")
    found = posterior.acquisition(candidates, 2, of=table[:8])
    assert found.scores.index.equals(candidates.index) and found.scores.name == "score"
    assert found.gains.index.tolist() == candidates.index[found.positions].tolist()
    assert found.gains.iloc[0] == found.scores.max() == found.scores[found.gains.index[0]]
    as_arrays = posterior.acquisition(candidates[["a", "b"]].to_numpy(), 2, of=table[["a", "b"]][:8].to_numpy())
    assert isinstance(as_arrays.scores, np.ndarray) and as_arrays.positions.tolist() == found.positions.tolist()
    np.testing.assert_array_equal(as_arrays.scores, found.scores)
    rows = torch.from_numpy(np.array(candidates[["a", "b"]]))
    as_tensors = posterior.acquisition(rows, of=table[:8])
    assert isinstance(as_tensors.positions, torch.Tensor) and float(as_tensors.scores[0]) == found.scores.iloc[0]


def binary_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(x, (y > 50).astype(int)) for x, y in pairs()]


def entropy(probability: np.ndarray) -> np.ndarray:
    return -(probability * np.log(probability) + (1 - probability) * np.log1p(-probability))


def test_information_of_labels_is_that_of_quadrature_over_logits() -> None:
    """Two classes: the difference of the logits is Gaussian, in one dimension."""
    head = make_algorithm("softmax", posterior_temperature=1.0, num_evaluation_samples=4000)
    network = MLP(2, input_shape=2, hidden_sizes=()).double()
    learner = MetaLearner(network, head).fit(binary_pairs(), settings=ONE_STEP)
    x, y = binary_pairs()[0]
    posterior = learner.adapt(x[:6], y[:6])
    candidates = torch.from_numpy(x[6:])
    fitted_model = learner.fitted_model
    inputs = head.inputs(
        fitted_model.model, learner.meta_parameters.shared, posterior.value, fitted_model.encode("x", candidates)
    )
    covariance = head.covariance(posterior.value.solution, inputs)
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    mean = (head.mean(posterior.value.solution, inputs) @ difference).numpy()
    deviation = (covariance @ difference @ difference).sqrt().numpy()
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    probability = 1 / (1 + np.exp(-(mean[:, None] + deviation[:, None] * nodes)))
    weights = weights / weights.sum()
    expected = entropy(probability @ weights) - entropy(probability) @ weights
    found = posterior.acquisition(candidates, 3)
    np.testing.assert_allclose(found.scores, expected, rtol=2e-3)
    assert found.positions.tolist() == np.argsort(-expected)[:3].tolist()
    np.testing.assert_array_equal(found.gains, found.scores[found.positions])
    # It is that of the posterior, whatever temperature calibration found.
    warm = learner.with_fitted(dataclasses.replace(fitted_model, temperature=3.0)).adapt(x[:6], y[:6])
    np.testing.assert_allclose(warm.acquisition(candidates).scores, found.scores, rtol=1e-12)


def test_information_of_weight_samples_is_by_hand() -> None:
    """Of an algorithm on weights: the entropy of the mean of its samples less the mean of their entropies."""
    learner = MetaLearner(MLP(2, input_shape=2, hidden_sizes=(4,)).double(), "ibaml").fit(
        binary_pairs(), settings=ONE_STEP
    )
    x, y = binary_pairs()[0]
    posterior = learner.adapt(x[:6], y[:6])
    samples = posterior.predict(x[6:]).samples()[..., 1]
    expected = entropy(samples.mean(0)) - entropy(samples).mean(0)
    np.testing.assert_allclose(posterior.acquisition(x[6:]).scores, expected, rtol=1e-7, atol=1e-12)
    assert expected.max() > 1e-9


def test_information_of_gaussian_classes_is_that_of_quadrature_over_their_means() -> None:
    """One feature and two classes: a grid over both means, weighted by what the features themselves tell of them."""
    head = GaussianClasses()
    double = torch.float64
    prior = GaussianClassesPrior(
        torch.tensor([[0.3]], dtype=double),
        torch.tensor([[1.0]], dtype=double),
        torch.tensor([-0.5], dtype=double),
        torch.zeros(0, dtype=double),
    )
    rows = torch.tensor([[-1.0], [2.0], [1.2]], dtype=double)
    support = Batch(torch.cat([rows, torch.ones_like(rows)], 1), torch.tensor([0, 1, 1]))
    solution, _ = head.solve(prior, {}, support, 2)
    asked = torch.tensor([[0.4], [-3.0], [1.5], [3.0]], dtype=double)
    inputs = torch.cat([asked, torch.ones_like(asked)], 1)
    found = torch.stack(
        [head.label_information(solution, inputs, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    )
    grid = torch.linspace(-12, 12, 1201, dtype=double)
    variance = prior.log_sigma2.exp()
    of_mean = [-0.5 * (grid - solution.mean[c]) ** 2 / solution.log_var[c].exp() for c in range(2)]
    weight = of_mean[0][:, None] + of_mean[1]
    for row, z in enumerate(asked[:, 0]):
        of_features = -0.5 * (z - grid) ** 2 / variance
        joint = torch.logaddexp(of_features[:, None], of_features)
        likely = torch.softmax((weight + joint).flatten(), 0)
        probability = torch.exp(of_features[:, None] - joint).flatten()
        conditional = torch.special.entr(probability) + torch.special.entr(1 - probability)
        overall = (likely * probability).sum()
        expected = torch.special.entr(overall) + torch.special.entr(1 - overall) - (likely * conditional).sum()
        error = found[:, row].std() / len(found) ** 0.5
        assert abs(found[:, row].mean() - expected) < 5 * error + 1e-9, (row, found[:, row].mean(), expected)
    # The posterior itself chooses by it.
    learner = MetaLearner(MLP(2, input_shape=2, hidden_sizes=()), head).fit(binary_pairs(), settings=ONE_STEP)
    x, y = binary_pairs()[0]
    scores = learner.adapt(x[:6], y[:6]).acquisition(x[6:], 2)
    assert (scores.scores >= 0).all() and scores.positions[0] == scores.scores.argmax()


def test_what_cannot_be_told_is_refused() -> None:
    x, y = pairs()[0]
    line = fitted(make_algorithm("linear_gaussian")).adapt(x[:3], y[:3])
    with pytest.raises(ValueError, match="num is 5; expected at least 1 and at most the 4 candidates"):
        line.acquisition(x[:4], 5)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        line.acquisition(x[:4], 0)
    with pytest.raises(ValueError, match="of has 2 missing"):
        line.acquisition(torch.from_numpy(x[:4]), of=torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="candidates and of have 4001 rows, whose joint covariance is needed"):
        line.acquisition(np.zeros((4001, 2)))
    for settings in ({"covariance": "diagonal"}, {"centre": True}):
        parts = fitted(make_algorithm("linear_gaussian", **settings)).adapt(x[:3], y[:3])
        with pytest.raises(ValueError, match="'linear_gaussian', as it is set, takes all examples to learn from a fur"):
            parts.acquisition(x[:4])
    sampled = fitted(make_algorithm("ibaml")).adapt(x[:3], y[:3])
    with pytest.raises(ValueError, match=re.escape("heads with Gaussian noise alone, but the algorithm is 'ibaml'")):
        sampled.acquisition(x[:4])
    weights = fitted(make_algorithm("maml")).adapt(x[:3], y[:3])
    with pytest.raises(ValueError, match="algorithm 'maml' has no posterior, so that it does not tell"):
        weights.acquisition(x[:4])
    of_classes = MetaLearner(MLP(2, input_shape=2, hidden_sizes=()), make_algorithm("softmax", posterior_temperature=0))
    x, y = binary_pairs()[0]
    mode = of_classes.fit(binary_pairs(), settings=ONE_STEP).adapt(x[:3], y[:3])
    with pytest.raises(ValueError, match="algorithm 'softmax', as it is set, predicts from one point"):
        mode.acquisition(x[:4])
    with pytest.raises(ValueError, match="of names rows whose variance is to fall, but the model is of classes"):
        mode.acquisition(x[:4], of=x[:2])
