"""What is known of one task: predictions, and what further examples add."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ibaml import tree
from ibaml.algorithms.guard import CopiedAtRest, Guard
from ibaml.checks import require_positive_int
from ibaml.data.tables import Array
from ibaml.likelihoods import ClassPrediction, MixturePrediction, Prediction
from ibaml.optional import require
from ibaml.posterior.acquisition import Acquisition, acquire, in_terms_of
from ibaml.priors import DiagonalGaussian
from ibaml.types import Batch

if TYPE_CHECKING:
    from ibaml.posterior.fitted import FittedModel
    from ibaml.posterior.module import TaskModule


class TaskPosterior(CopiedAtRest):
    """What a learner knows about one task after adaptation.

    Attributes:
        value: Adapted weights, a distribution over them, or what a head found.
        grad_norm: Norm of the inner gradient at ``value``; near zero when adaptation has converged.
        num_support: Examples that the posterior has seen.
    """

    def __init__(
        self,
        fitted: "FittedModel",
        value: Any,
        grad_norm: float,
        *,
        num_support: int,
        support: Batch | None,
        labels: Array | None,
        seed: int,
    ) -> None:
        self._fitted = fitted
        self._support = support
        self._labels = labels
        self._seed = seed
        self.value = value
        self.grad_norm = grad_norm
        self.num_support = num_support

    def network_guard(self) -> Guard:
        """Returns the guard of the network; see ``CopiedAtRest``."""
        return self._fitted.model.guard

    def __repr__(self) -> str:
        return f"TaskPosterior(num_support={self.num_support}, grad_norm={self.grad_norm:.3g})"

    def predict(
        self, x_query: Any, *, seed: int = 0, max_error: float | None = None, joint: bool = False
    ) -> Prediction:
        """Predicts at new inputs of the task.

        Args:
            x_query: Inputs, ``[num_examples, *input_shape]``, or a DataFrame with the columns of training.
            seed: Seed of the weight samples.
            max_error: Classes: abstain from examples (``prediction.abstains``) such that no more than this share of the
                others gets a wrong label. The confidence that an answer needs for it was found on validation tasks, by
                ``fit`` or ``calibrate``: the promise, with 95% confidence, is for tasks like those, on average over
                them. None: answer all.
            joint: Numbers: give ``prediction.covariance``, that between the rows, as well.

        Returns:
            A prediction with ``.probs`` and ``.labels`` (classes) or ``.mean`` and ``.interval()`` (regression),
            ``.total_uncertainty``, ``.aleatoric``, ``.epistemic`` and ``.samples()``. numpy arrays and DataFrames in
            give numpy arrays out, tensors give tensors.

        Raises:
            TypeError: If the inputs are no numbers.
            FloatingPointError: If the prediction is not finite.
            ValueError: If the inputs hold NaN, require a gradient or do not fit the network; if ``max_error`` is out of
                range, or given to a model of numbers or one that has not been calibrated; if ``joint`` is asked of an
                algorithm whose posterior over functions is not Gaussian, or of too many rows.

        Cost:
            ``num_evaluation_samples`` forward passes; for ``joint`` the square of the number of rows.
        """
        if isinstance(x_query, torch.Tensor) and x_query.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x_query requires a gradient, and predictions are made without one: pass x_query.detach(), or for "
                "derivatives in the inputs call posterior.to_module() with them."
            )
        fitted = self._fitted
        min_confidence = None if max_error is None else fitted.min_confidence(max_error)
        encoded = fitted.encode("x_query", x_query)
        fitted.model.check_inputs("x_query", encoded)
        try:
            prediction = fitted.predict(self.value, encoded, seed=seed)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the network ({type(fitted.model.network).__name__}) cannot process x_query of shape "
                f"{tuple(encoded.shape)} and dtype {encoded.dtype}: {error}"
            ) from error
        if isinstance(prediction, ClassPrediction):
            prediction = dataclasses.replace(prediction, min_confidence=min_confidence)
        if joint:
            covariance = fitted.joint_covariance(self.value, encoded)
            assert isinstance(prediction, MixturePrediction)
            prediction = dataclasses.replace(prediction, joint=covariance)
        as_numpy = not isinstance(x_query, torch.Tensor)
        if fitted.preprocessing is None and not as_numpy:
            return prediction
        is_vector = fitted.preprocessing is not None and fitted.preprocessing.is_vector
        return prediction.in_terms_of(labels=self._labels, is_vector=is_vector, as_numpy=as_numpy)

    def acquisition(self, candidates: Any, num: int = 1, *, of: Any = None) -> Acquisition:
        """Says which rows to measure next, and what each candidate is expected to tell.

        Numbers: by how much a measurement lowers the variance of predictions, in the target's unit squared (of several
        targets the sum, each relative to its variance in training), averaged over the rows ``of``. For heads with
        Gaussian noise that is exact, and the same whatever the outcome. Several rows are chosen one after the other,
        each given those before it, so that they are not all of one kind.

        Classes: the mutual information between the label and the weights of the task, in nats: large where the samples
        of the posterior disagree, not where all are unsure alike. It is that of the posterior itself, without the
        temperature of ``calibrate``. Of several rows each is judged by itself.

        Args:
            candidates: Inputs of the rows that could be measured, as for ``predict``.
            num: Rows to choose; each candidate can be chosen once.
            of: Numbers: inputs of the rows whose predictions matter. None: the candidates.

        Returns:
            The chosen rows, their gains, and the scores of all candidates.

        Raises:
            TypeError: If the inputs are no numbers, or ``num`` is not an int.
            ValueError: If inputs do not fit the model, there are too many rows or too few candidates, ``of`` is given
                to a model of classes, or the algorithm has no posterior that tells.

        Cost:
            One pass of the rows through the network; for numbers ``num`` times the square of the number of rows.
        """
        fitted = self._fitted
        require_positive_int("num", num)
        encoded = fitted.encode("candidates", candidates)
        fitted.model.check_inputs("candidates", encoded)
        targets = None if of is None else fitted.encode("of", of)
        if targets is not None:
            fitted.model.check_inputs("of", targets)
        return in_terms_of(acquire(fitted, self.value, encoded, targets, num), candidates)

    def to_botorch(self) -> Any:
        """Returns the posterior as a BoTorch model, for acquisition functions and their optimisers.

        Its inputs are features in the order of training and in the units of the data, ``[*batch, q, d]``, and so are
        its targets. ``posterior(X)`` is the exact joint Gaussian and differentiable in ``X``;
        ``condition_on_observations`` and fantasies are exact updates.

        Raises:
            ImportError: If BoTorch is not installed.
            ValueError: If the algorithm is none whose posterior over functions is Gaussian, or features are made of
                columns of categories or with gaps.
        """
        require("botorch", "BoTorch", "botorch")
        from ibaml.posterior.botorch import TaskModel

        return TaskModel(self._fitted, self.value)

    def to_module(self, *, num_samples: int | None = None, seed: int = 0, of_features: bool = False) -> "TaskModule":
        """Returns the posterior as a plain ``nn.Module``, to be exported, shipped or differentiated in its inputs.

        It holds copies of all that a prediction needs: scales, trained network or backbone, what adaptation found, and
        the temperature of ``calibrate``. Called with a tensor in the units of the data (columns in the order of
        training) it returns the probabilities of ``predict``, or its mean and variance as a pair. Nothing is checked,
        resized or sampled. It goes through ``torch.export.export`` with any number of examples, from there to ONNX
        (``torch.onnx.export``), into ``state_dict`` and to other devices.

        Args:
            num_samples: Algorithms that adapt a distribution over all weights: so many weight samples, those of
                ``predict`` where it is the algorithm's ``num_evaluation_samples``. None: the mean of the weights.
            seed: Of the weight samples.
            of_features: With a backbone: the inputs are its features, computed elsewhere.

        Raises:
            ValueError: If the backbone is a function and ``of_features`` False; if there is no backbone and it is True;
                if inputs are columns of categories or with gaps; if ``num_samples`` is given to an algorithm without
                weight samples.
            TypeError: If ``num_samples`` is no integer.
        """
        from ibaml.posterior.module import to_module  # which imports what is below

        if num_samples is not None:
            require_positive_int("num_samples", num_samples)
        return to_module(self._fitted, self.value, num_samples=num_samples, seed=seed, of_features=of_features)

    def update(self, x_more: Any, y_more: Any) -> "TaskPosterior":
        """Takes in more examples of the same task and returns the new posterior; this one stays as it is.

        Without examples it is this one.

        By Bayes' rule the posterior depends on all examples and not on the order in which they came. Heads whose
        posterior is exact (``linear_gaussian``, ``gp``, ``gaussian_classes``) take the new examples in from the
        posterior alone and keep no others: whatever the parts, the result is that of ``adapt`` to all at once. The
        softmax head is solved again for all examples, which it keeps: a Laplace posterior is no sufficient statistic.

        So do algorithms on weights. The inner problem is that of all examples so far, with the meta-learned prior; only
        its solver starts at this posterior, which is near the new one. A converged solver gives what ``adapt`` gives
        for all examples at once, after fewer steps. (Taking the old posterior as the prior of the new examples alone
        would save memory and add up the errors of its diagonal covariance.) Algorithms that adapt weights by a few
        steps (MAML) take these steps from the adapted weights: for them an update is further training on all examples.
        Where the inner steps end before the solution, parts and the whole differ: ``distance_to_solution`` says how
        far that is, and ``refined`` takes further steps.

        Args:
            x_more: Inputs of further examples.
            y_more: Their labels or targets.

        Raises:
            TypeError: If values are of the wrong kind.
            ValueError: If the examples do not fit the model.

        Cost:
            Exact heads: a pass of the new examples and linear algebra in the number of weights (``gp``: the square of
            the number of all examples). Others: that of ``adapt`` to all examples so far.
        """
        more = self._fitted.encode_support(x_more, y_more, self._labels)
        if not len(more.y):
            return self
        found = self._fitted.extend(self.value, more)
        if found is not None:
            return TaskPosterior(
                self._fitted,
                found.value,
                float(found.grad_norm),
                num_support=self.num_support + len(more.y),
                support=None,
                labels=self._labels,
                seed=self._seed,
            )
        assert self._support is not None
        support = Batch(torch.cat([self._support.x, more.x]), torch.cat([self._support.y, more.y]))
        return self._fitted.solve(support, self._labels, seed=self._seed, start=self.value)

    def refined(self, rounds: int = 1) -> "TaskPosterior":
        """Runs the inner solver again from here on, on the same examples, and returns the new posterior.

        Heads are solved already: it is this one. For algorithms whose few steps are what was trained (MAML), more of
        them are another predictor.

        Args:
            rounds: How many times.

        Raises:
            TypeError: If ``rounds`` is not an int.
            ValueError: If it is below one.
            FloatingPointError: If the solution is not finite.

        Cost:
            That of ``adapt``, each time.
        """
        require_positive_int("rounds", rounds)
        found = self
        for _ in range(0 if self._fitted.algorithm.uses_features else rounds):
            assert found._support is not None
            found = self._fitted.solve(found._support, self._labels, seed=self._seed, start=found.value)
        return found

    def distance_to_solution(self) -> float:
        """Says how far from solved the inner problem is: by how much as many inner steps again move the posterior.

        Of a diagonal distribution over weights it is the root mean square of the shift of the means in standard
        deviations, else the length of the shift relative to what is shifted; 0 for heads, which are solved exactly.
        Above about 0.1 the posterior depends on where the solver started, so that ``update`` does not give what
        ``adapt`` to all examples gives: take ``refined()``, or more or longer inner steps
        (``MetaLearner.adapting_with``).

        Raises:
            FloatingPointError: If further steps give what is not finite.

        Cost:
            That of ``adapt``.
        """
        further = self.refined()
        if further is self:
            return 0.0
        if not isinstance(self.value, DiagonalGaussian):
            return float(tree.norm(tree.sub(further.value, self.value)) / tree.norm(self.value).clamp_min(1e-30))
        shift = tree.ravel(tree.sub(further.value.mean, self.value.mean))[0]
        deviation = torch.exp(0.5 * tree.ravel(self.value.log_var)[0])
        return float((shift / deviation).square().mean().sqrt())
