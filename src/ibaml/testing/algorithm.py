"""What every algorithm promises."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import RECORDS, Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.model import Model, build_model
from ibaml.algorithms.nll import FunctionNll
from ibaml.data.sources import Mixtures, Sinusoid
from ibaml.learner import MetaLearner
from ibaml.likelihoods import make_likelihood
from ibaml.solvers.inner import GradientDescent, NaturalGradient
from ibaml.solvers.linear import Dense
from ibaml.testing.base import assert_close, assert_json_round_trip, generator, with_settings
from ibaml.train.checkpoint import load_tensors, meta_from_tensors, meta_to_tensors, save_tensors
from ibaml.types import Batch, Episode, Params, Tensor


class _Problem(NamedTuple):
    """A task on a small network, whose last layer is adapted; in float64."""

    nll: Model
    adapted: Params
    meta: MetaParameters
    episode: Episode
    noise: TaskNoise


class AlgorithmContract:
    """Adaptation and hypergradients on small tasks, and training and storage by ``MetaLearner``.

    Attributes:
        tolerance: Largest relative error of a hypergradient against central differences of its own outer loss, in any
            tensor of the meta-parameters: for estimators that are exact.
        implicit_tolerance: The same where the inner problem was solved, for implicit ones.
        adapt: Name pattern of what is adapted in tests of whole networks: ``"2.*"`` is the last layer.
        likelihood: Name of the likelihood of the tasks: ``"gaussian"`` for numbers, ``"categorical"`` for classes.
    """

    tolerance: ClassVar[float] = 1e-7
    implicit_tolerance: ClassVar[float] = 1e-5
    adapt: ClassVar[str] = "*"
    likelihood: ClassVar[str] = "gaussian"

    @staticmethod
    def make() -> Algorithm:
        """Returns the algorithm to test."""
        raise NotImplementedError

    @staticmethod
    def solving(algorithm: Algorithm) -> Algorithm:
        """Returns the algorithm with settings under which it solves a small inner problem, for implicit gradients.

        Those of the library have settings ``inner``, ``linear`` and ``temperature``; others override this.
        """
        inner = (
            NaturalGradient(num_steps=80)
            if algorithm.is_bayesian
            else GradientDescent(num_steps=150, learning_rate=0.2)
        )
        return with_settings(algorithm, inner=inner, linear=Dense(), temperature=1.0)

    @pytest.fixture
    def algorithm(self) -> Algorithm:
        """The algorithm to test."""
        return self.make()

    def test_first_meta_parameters_are_around_the_weights(self, algorithm: Algorithm) -> None:
        """The prior's mean is the initial weights; what is shared stays as it is."""
        problem = self._problem(algorithm)
        if not algorithm.uses_features:
            places, _ = algorithm.parameter_groups(problem.meta.prior)
            assert_close(places, list(problem.adapted.values()))
        again = algorithm.init(problem.adapted, problem.meta.shared, generator=generator(1))
        assert_close(again, problem.meta, 0.0)

    def test_posterior_is_around_weights_of_the_task(self, algorithm: Algorithm) -> None:
        """Of the shapes of the weights, with the gradient norm of the inner problem; the same every time."""
        problem = self._problem(algorithm)
        first, again = (_adapt(algorithm, problem) for _ in range(2))
        x = problem.episode.query.x
        assert algorithm.mean_outputs(problem.nll, problem.meta.shared, first.value, x).shape == (
            len(x),
            self._num_outputs,
        )
        assert first.grad_norm.shape == () and torch.isfinite(first.grad_norm)
        assert_close(again.value, first.value, 0.0)
        spared = _adapt(algorithm, problem, with_grad_norm=False)
        assert_close(spared.value, first.value)

    def test_outputs_follow_their_noise(self, algorithm: Algorithm) -> None:
        """Those of weight samples, or of one with their variance, if there is a distribution; else of one."""
        problem = self._problem(algorithm)
        posterior = _adapt(algorithm, problem).value
        noise = algorithm.draw_evaluation_noise(problem.meta, generator=generator(3))
        assert_close(algorithm.draw_evaluation_noise(problem.meta, generator=generator(3)), noise, 0.0)
        x = problem.episode.query.x
        of_query = (problem.nll, problem.meta.shared, posterior, x)
        found = algorithm.outputs(*of_query, noise)
        assert_close(algorithm.outputs(*of_query, noise), found, 0.0)
        outputs, variance = found["outputs"], found.get("output_variance")
        assert outputs.shape[1:] == (len(x), self._num_outputs) and torch.isfinite(outputs).all()
        assert variance is None or (variance.shape == outputs.shape and (variance > 0).all())
        has_spread = variance is not None or (len(outputs) > 1 and bool((outputs[0] - outputs[1]).norm() > 0))
        # A head may integrate over its posterior in closed form.
        assert has_spread == algorithm.is_bayesian or (algorithm.uses_features and not has_spread)

    def test_hypergradient_has_the_structure_of_the_meta_parameters(self, algorithm: Algorithm) -> None:
        """Finite, nowhere zero as a whole, with scalar diagnostics, at the parameters that ``adapt`` finds."""
        problem = self._problem(algorithm)
        gradient, info = _hypergradient(algorithm, problem)
        _assert_same_shapes(gradient, problem.meta)
        assert all(torch.isfinite(leaf).all() and leaf.norm() > 0 for leaf in tree.leaves(gradient) if leaf.numel())
        assert all(value.shape == () and torch.isfinite(value) for value in info[:4])
        adapted = _adapt(algorithm, problem)
        assert_close(info.inner_params, adapted.value, 1e-9)
        assert_close(info.inner_grad_norm, adapted.grad_norm, 1e-9)

    def test_nothing_is_changed_in_place(self, algorithm: Algorithm) -> None:
        """Meta-parameters, data and noise are arguments; a second call gives the same."""
        problem = self._problem(algorithm)
        before = tree.map(torch.clone, problem[1:])
        first, again = (_hypergradient(algorithm, problem) for _ in range(2))
        assert_close(problem[1:], before, 0.0)
        assert_close(again, first, 0.0)
        assert not any(leaf.requires_grad for leaf in tree.leaves(first))

    def test_hypergradient_equals_central_differences_of_its_outer_loss(self, algorithm: Algorithm) -> None:
        """Of whatever estimator claims to be exact: unrolled ones always, implicit ones where the problem is solved."""
        if algorithm.estimator == "first_order":
            pytest.skip("a first-order gradient is not the derivative of its outer loss")
        tolerance = self.tolerance
        if algorithm.estimator == "implicit":
            algorithm, tolerance = self.solving(algorithm), self.implicit_tolerance
        problem = self._problem(algorithm)
        gradient, info = _hypergradient(algorithm, problem)
        if algorithm.estimator == "implicit":
            assert info.inner_grad_norm < 1e-8, f"the inner problem is not solved: gradient {info.inner_grad_norm}"
            assert info.linear_residual < 1e-6
        flat, unravel = tree.ravel(problem.meta)

        def outer_loss(vector: Tensor) -> Tensor:
            return _hypergradient(algorithm, problem._replace(meta=unravel(vector)))[1].outer_loss

        units = 1e-5 * torch.eye(len(flat), dtype=flat.dtype)
        above, below = torch.func.vmap(outer_loss)(torch.cat([flat + units, flat - units])).chunk(2)
        expected = unravel((above - below) / 2e-5)
        for actual, wanted in zip(tree.leaves(gradient), tree.leaves(expected), strict=True):
            if not actual.numel():
                continue
            error = float((actual - wanted).norm() / wanted.norm())
            assert error < tolerance, f"relative error {error}: {actual} against {wanted}"

    def test_vmap_over_tasks_equals_the_loop(self, algorithm: Algorithm) -> None:
        """Training maps over the tasks of a step."""
        problems = [self._problem(algorithm, seed) for seed in range(3)]
        nll, meta = problems[0].nll, problems[0].meta

        def compute(episode: Episode, noise: TaskNoise) -> Any:
            gradient, info = algorithm.hypergradient(nll, meta, episode, noise)
            return gradient, info, algorithm.adapt(nll, meta, episode.support, noise)[:2]

        stacked = tree.map(lambda *leaves: torch.stack(leaves), *((p.episode, p.noise) for p in problems))
        batched = torch.func.vmap(compute)(*stacked)
        for index, problem in enumerate(problems):
            single = compute(problem.episode, problem.noise)
            assert_close(tree.map(lambda leaf, i=index: leaf[i], batched), single)

    def test_flat_weights_give_the_same(self, algorithm: Algorithm) -> None:
        """Fast training passes all weights as one vector."""
        if algorithm.uses_features:
            pytest.skip("a head is over no weights of the network")
        problem = self._problem(algorithm)
        _, unravel = tree.ravel(problem.adapted)

        def flat(named: Params) -> Params:
            return {"flat": tree.ravel(named)[0]}

        def flat_nll(adapted: Params, shared: Params, batch: Batch) -> Tensor:
            return problem.nll.per_example(unravel(adapted["flat"]), shared, batch)

        meta = MetaParameters(algorithm.map_weights(flat, problem.meta.prior), problem.meta.shared)
        noise = TaskNoise(*(torch.func.vmap(flat)(part) if part else {} for part in problem.noise))
        found, info = algorithm.hypergradient(FunctionNll(flat_nll), meta, problem.episode, noise)
        expected, expected_info = _hypergradient(algorithm, problem)
        named = algorithm.map_weights(lambda vector: unravel(vector["flat"]), found.prior)
        assert_close(named, expected.prior, 1e-9)
        assert_close(found.shared, expected.shared, 1e-9)
        assert_close(info.outer_loss, expected_info.outer_loss)

    def test_support_of_one_example(self, algorithm: Algorithm) -> None:
        """The smallest task, with no shared weights if everything can be adapted."""
        problem = self._problem(algorithm, num_support=1, adapt=self.adapt)
        gradient, info = _hypergradient(algorithm, problem)
        assert tree.all_finite(gradient) and torch.isfinite(info.outer_loss)

    def test_no_examples_leave_the_prior(self, algorithm: Algorithm) -> None:
        """Bayes' rule without data; what follows from examples is then the same from there as from the prior."""
        if not algorithm.is_bayesian or getattr(algorithm, "centre", False):
            pytest.skip("there is no prior that answers, or it is of features centred at examples")
        problem = self._problem(algorithm)
        support = problem.episode.support
        nothing = Batch(support.x[:0], support.y[:0])
        start = algorithm.adapt(problem.nll, problem.meta, nothing, problem.noise)
        assert start.grad_norm == 0
        if not algorithm.uses_features:
            assert_close(start.value, problem.meta.prior, 0.0)
        noise = algorithm.draw_evaluation_noise(problem.meta, generator=generator(3))
        found = algorithm.outputs(problem.nll, problem.meta.shared, start.value, problem.episode.query.x, noise)
        assert tree.all_finite(found)
        later = algorithm.adapt(problem.nll, problem.meta, support, problem.noise, start=start.value)
        assert_close(later.value, _adapt(algorithm, problem).value, 0.0)

    def test_examples_in_parts_are_those_at_once(self, algorithm: Algorithm) -> None:
        """Bayes' rule from the posterior alone, in another order, also from the prior; None if all are needed."""
        problem = self._problem(algorithm)
        nll, meta, support = problem.nll, problem.meta, problem.episode.support
        expected = _adapt(algorithm, problem).value
        if not algorithm.is_sequential:
            assert algorithm.update(nll, meta, expected, support) is None
            return
        noise = algorithm.draw_evaluation_noise(meta, generator=generator(3))
        wanted = algorithm.outputs(nll, meta.shared, expected, problem.episode.query.x, noise)
        for sizes in ((0, 6), (1, 2, 3), (5, 1)):
            x, y = (part.flip(0).split(list(sizes)) for part in support)
            found = algorithm.adapt(nll, meta, Batch(x[0], y[0]), problem.noise)
            for more in zip(x[1:], y[1:], strict=True):
                extended = algorithm.update(nll, meta, found.value, Batch(*more))
                assert extended is not None and extended.grad_norm < 1e-9
                found = extended
            assert_close(algorithm.outputs(nll, meta.shared, found.value, problem.episode.query.x, noise), wanted, 1e-9)

    def test_meta_parameters_survive_a_checkpoint(self, algorithm: Algorithm) -> None:
        """As named tensors in a file, bit by bit."""
        problem, other = self._problem(algorithm), self._problem(algorithm, seed=5)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            save_tensors(path, meta_to_tensors(problem.meta), {})
            again = meta_from_tensors(load_tensors(path)[0], like=other.meta, source="checkpoint")
        assert type(again.prior) is type(problem.meta.prior)
        assert_close(again, problem.meta, 0.0)

    def test_learner_trains_and_predicts_the_same_when_loaded(self, algorithm: Algorithm) -> None:
        """Two steps of ``MetaLearner.fit``; saved and loaded, the predictions do not change by a bit."""
        tasks = (
            Sinusoid(num_shots=3, num_queries=4)
            if self.likelihood == "gaussian"
            else Mixtures(num_ways=self._num_outputs, num_features=1, num_informative=1, num_queries=4)
        ).sampler("train")
        learner, again = (self._learner(algorithm).fit(tasks, num_steps=2) for _ in range(2))
        x, y = self._batch(4, generator(0), torch.float32)
        expected = _predicted(learner, x, y)
        assert torch.isfinite(expected).all()
        assert_close(_predicted(again, x, y), expected, 0.0)
        moved = tree.sub(learner.meta_parameters, self._learner(algorithm).fit(tasks, num_steps=1).meta_parameters)
        assert tree.norm(moved) > 0
        if type(algorithm) not in RECORDS:
            pytest.skip("only the library's own algorithms are loaded from a folder")
        with tempfile.TemporaryDirectory() as folder:
            loaded = MetaLearner.load(learner.save(folder), network=self._network(torch.float32))
        assert_close(_predicted(loaded, x, y), expected, 0.0)

    def _learner(self, algorithm: Algorithm) -> MetaLearner:
        network = self._network(torch.float32)
        return MetaLearner(network, algorithm=algorithm, likelihood=self.likelihood, adapt=self.adapt)

    @property
    def _num_outputs(self) -> int:
        return 1 if self.likelihood == "gaussian" else 3

    def _network(self, dtype: torch.dtype) -> nn.Module:
        network = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, self._num_outputs)).to(dtype)
        source = generator(1)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(dtype)
        return network

    def _batch(self, size: int, source: torch.Generator, dtype: torch.dtype) -> Batch:
        x = torch.randn(size, 1, generator=source, dtype=dtype)
        y = torch.sin(2 * x) + 0.2 * torch.randn(size, 1, generator=source, dtype=dtype)
        return Batch(x, y if self.likelihood == "gaussian" else torch.bucketize(y[:, 0], torch.tensor([-0.5, 0.5])))

    def _problem(self, algorithm: Algorithm, seed: int = 0, num_support: int = 6, adapt: str = "2.*") -> _Problem:
        likelihood = make_likelihood(self.likelihood, self._num_outputs)
        model = build_model(self._network(torch.float64), likelihood, adapt=adapt)
        model = dataclasses.replace(model, num_outputs=self._num_outputs)
        shared = tree.map(lambda leaf: leaf.double(), model.shared)
        meta = algorithm.init(model.adapted, shared, generator=generator(1))
        source = generator(seed + 10)
        episode = Episode(self._batch(num_support, source, torch.float64), self._batch(9, source, torch.float64))
        return _Problem(model, model.adapted, meta, episode, algorithm.draw_noise(meta, generator=source))

    def test_algorithm_describes_itself(self, algorithm: Algorithm) -> None:
        """For reports and messages."""
        assert algorithm.name and algorithm.describe()
        assert (algorithm.temperature is None) == (not algorithm.is_bayesian)
        assert algorithm.num_curvature_points >= 0

    def test_json_round_trip(self, algorithm: Algorithm) -> None:
        """An algorithm is a record that recipes and saved models can hold."""
        assert_json_round_trip(algorithm)


def _predicted(learner: MetaLearner, x: Tensor, y: Tensor) -> Tensor:
    prediction: Any = learner.adapt(x, y).predict(x)
    return prediction.mean if hasattr(prediction, "mean") else prediction.probs


def _adapt(algorithm: Algorithm, problem: _Problem, **options: Any) -> Any:
    return algorithm.adapt(problem.nll, problem.meta, problem.episode.support, problem.noise, **options)


def _hypergradient(algorithm: Algorithm, problem: _Problem) -> Any:
    return algorithm.hypergradient(problem.nll, problem.meta, problem.episode, problem.noise)


def _assert_same_shapes(actual: Any, like: Any) -> None:
    assert type(actual) is type(like)
    for one, other in zip(tree.leaves(actual), tree.leaves(like), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
