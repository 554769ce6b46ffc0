"""What a learner does once it is fitted: it adapts, predicts, and is judged and calibrated on held-out tasks."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch

from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.guard import CopiedAtRest, Guard
from ibaml.data.prepare import SplitSettings
from ibaml.data.preprocessing import Preprocessing
from ibaml.learner.curve import learning_curve
from ibaml.learner.estimator import Estimator, NotFittedError
from ibaml.learner.groups import predict_new
from ibaml.learner.held_out import calibrate_held_out, evaluate_held_out
from ibaml.learner.online import observe_task
from ibaml.learner.scores import EvaluationReport
from ibaml.likelihoods import Prediction
from ibaml.metrics import LearningCurve, Recalibration
from ibaml.posterior import FittedModel, TaskPosterior
from ibaml.train.checkpoint import meta_from_tensors, meta_to_tensors
from ibaml.train.evaluate import Evaluation
from ibaml.train.processes import Processes
from ibaml.train.progress import console_of
from ibaml.types import ClassScope, ColumnName


class Predictor(Estimator, CopiedAtRest):
    """The methods of a learner that are functions of what was fitted.

    Attributes:
        algorithm: What adapts.
        classes: Whether class labels mean the same in all tasks.
        verbose: Whether to show progress; None: on a terminal.
    """

    algorithm: Algorithm
    classes: ClassScope
    verbose: bool | None
    _fitted: FittedModel | None
    _splits: SplitSettings

    def network_guard(self) -> Guard | None:
        """Returns the guard of the network; see ``CopiedAtRest``."""
        return None if self._fitted is None else self._fitted.model.guard

    @property
    def fitted_model(self) -> FittedModel:
        """What adaptation and prediction need, as one immutable value.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
        """
        if self._fitted is None:
            raise NotFittedError(
                "this MetaLearner has not been fitted: call fit(train_tasks) or MetaLearner.load first."
            )
        return self._fitted

    @property
    def meta_parameters(self) -> MetaParameters:
        """The learned prior and shared parameters; errors as of ``fitted_model``."""
        return self.fitted_model.meta

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How data become tensors; None before ``fit``, and if they came as tensors."""
        return None if self._fitted is None else self._fitted.preprocessing

    @property
    def splits(self) -> SplitSettings:
        """How tasks are split, as ``fit`` was told."""
        return self._splits

    @property
    def calibration_temperature(self) -> float:
        """Factor by which predictions are made less sure, from validation tasks or ``calibrate``; 1 without any."""
        return 1.0 if self._fitted is None else self._fitted.temperature

    def adapt(self, x_support: Any, y_support: Any, *, seed: int = 0) -> TaskPosterior:
        """Adapts to one task; the posterior's ``update`` takes in more examples later.

        Args:
            x_support: Inputs, ``[num_examples, *input_shape]``, or a DataFrame with the columns of training. There may
                be no examples: the posterior is then the prior, where the algorithm has one and the classes are known.
            y_support: Labels or targets as in training; for a learner fitted on tensors class indices
                ``[num_examples]`` or targets ``[num_examples, num_outputs]``.
            seed: Seed of the noise of the inner problem.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If values are of the wrong kind.
            ValueError: If the examples do not fit the network or the likelihood, or there are none and no prior.
            FloatingPointError: If values are so far from those of training that the solution is not finite.
            MemoryError: If the support set is too large for the memory at hand.
        """
        return self.fitted_model.adapt(x_support, y_support, seed=seed)

    def adapting_with(self, algorithm: Algorithm) -> Self:
        """Returns a fitted learner that adapts with other settings, such as more inner steps than in training.

        Args:
            algorithm: Settings of an algorithm with the same kind of meta-parameters.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            ValueError: If the algorithm has other meta-parameters (weights instead of a Gaussian, or the reverse).
        """
        fitted = self.fitted_model
        like = algorithm.init(fitted.model.adapted, fitted.model.shared, generator=torch.Generator())
        meta = meta_from_tensors(meta_to_tensors(fitted.meta), like=like, source="the fitted learner")
        # What was counted and measured on held-out tasks was of the other one.
        changes = {"algorithm": algorithm, "meta": meta, "abstention": None, "recalibration": None}
        other = self.with_fitted(dataclasses.replace(fitted, **changes))
        other.algorithm, other._parameters = algorithm, {**self._parameters, "algorithm": algorithm}
        return other

    def with_fitted(self, fitted: FittedModel, splits: SplitSettings | None = None) -> Self:
        """Returns the learner with a model that was fitted in another way than by ``fit``, and other splits if any."""
        other = copy.copy(self)
        other._fitted, other._splits = fitted, self._splits if splits is None else splits
        return other

    def predict_new(
        self,
        known: Any,
        asked: Any,
        *,
        task: ColumnName | None = None,
        target: ColumnName | Sequence[ColumnName] | None = None,
        max_error: float | None = None,
    ) -> Prediction:
        """Predicts rows of many groups of a table in one call, also of groups of which nothing is known.

        Each group is a task: the result is that of ``adapt`` and ``predict`` group by group, many times sooner. A group
        without known rows gets the prediction of the prior, which is that for a group drawn from the population.

        Args:
            known: Table with the known rows of all groups: features, group and target. It may have no rows.
            asked: Table with the rows to predict: features and group.
            task: Column of both that says to which group a row belongs. None: that of ``fit``.
            target: Column or columns of ``known`` with the targets. None: those of ``fit``.
            max_error: Classes: abstain such that no more than this share of the other answers is wrong; see
                ``TaskPosterior.predict``. None: answer all.

        Returns:
            The prediction of the rows of ``asked``, in their order. ``samples()`` of a posterior in closed form are
            independent between groups; those of other algorithms share the noise of their weights.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If values are of the wrong kind.
            ValueError: If a column is missing, a row does not fit the model, or a group has no known rows where the
                model has no prior; if groups have classes of their own, so many that some are predicted by more samples
                than others.

        Warns:
            RuntimeWarning: If no asked group is among the known ones.

        Cost:
            Heads solve small groups of equal size at once, some 0.1 ms a group; other algorithms as by ``adapt``.
        """
        return predict_new(self.fitted_model, known, asked, task=task, target=target, max_error=max_error)

    def learning_curve(
        self, tasks: Any, num_support: Sequence[int] = (0, 1, 2, 5, 10), *, seed: int = 0
    ) -> LearningCurve:
        """Says how many known rows are needed: scores of the same held-out rows for each number of known ones.

        Each task is split once, into as many known rows as the largest number and the rest, which are predicted. A
        smaller number is the first of the known rows. Tasks with too few rows for the largest number are left out.

        Args:
            tasks: Tasks that training has not seen: a DataFrame, or ``(X, y)`` pairs, as ``fit`` took them.
            num_support: Numbers of known rows; 0 is the prior's prediction.
            seed: Seed of the splits.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If the tasks are no data that can be split, or a number is no integer.
            ValueError: If a number is negative, no task has rows enough, a task does not fit, or 0 is among the
                numbers where the model has no prior.

        Cost:
            An evaluation for each number.
        """
        return learning_curve(
            self.fitted_model, tasks, self._splits, num_support, seed=seed, console=console_of(self.verbose)
        )

    def observe(self, x: Any, y: Any, *, most_tasks: float | None = None) -> Self:
        """Takes one more task into the prior, in place: what is learned of tasks goes on without keeping them.

        For the linear-Gaussian head, whose tasks are a hierarchical model: mean and covariance of the weights and the
        noise variance make one step of incremental expectation maximisation
        (``ibaml.algorithms.heads.empirical_bayes``). For ``generalized_linear`` (counts, outliers) likewise, with
        Laplace's approximation and without the likelihood's own parameters. The prior stands for the tasks of training
        and all that were observed, each with the same weight, so that the order hardly matters and steps get smaller.
        Features of a network, scales and the temperature of ``calibrate`` stay as they are. Posteriors that exist
        already keep the prior that they were made with.

        Args:
            x: Inputs of all known rows of the task, as for ``adapt``.
            y: Their targets. Without rows nothing changes.
            most_tasks: The prior stands for at most so many tasks: more weigh less, so that old ones are forgotten
                where tasks change with time, or where those of training were of another kind. None: no limit.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If values are of the wrong kind.
            ValueError: If the examples do not fit the model, the algorithm is neither ``linear_gaussian`` with exact
                Bayes nor ``generalized_linear``, or its prior not diagonal or full, ``most_tasks`` is not positive, or
                a stored model of an earlier version does not say how many tasks it stands for and ``most_tasks`` does
                not either.

        Cost:
            That of ``adapt``, however many tasks there were.
        """
        self._fitted = observe_task(self.fitted_model, x, y, most_tasks)
        return self

    @property
    def recalibration(self) -> Recalibration | None:
        """What the last ``calibrate`` found, in one line by ``str``; None before, and after ``load``."""
        return None if self._fitted is None else self._fitted.recalibration

    def calibrate(
        self,
        validation_tasks: Any,
        *,
        num_support: int | Iterable[int] | None = None,
        num_tasks: int = 200,
        seed: int = 0,
    ) -> Self:
        """Fits one temperature on held-out tasks, by which all later predictions are made surer or less so.

        It stays as ``fit`` left it (1, or that of its validation tasks) where the gain in nll is not clear: where the
        gain's 95% interval, paired over tasks on which the temperature was not fitted, includes zero, or where there
        are fewer than ``ibaml.train.temperature.LEAST_TASKS`` tasks. ``recalibration`` says what was found.

        How sure predictions ought to be depends on how many rows are known: say how many there will be.

        For classes it divides logits, and it is counted how often predictions of each confidence are wrong, from which
        ``predict(max_error=...)`` knows when to abstain; for regression it multiplies standard deviations.

        Args:
            validation_tasks: Tasks that training has not seen, in the form that ``fit`` took.
            num_support: How many rows of a task will be known when the learner is used; several numbers if that
                varies, with each of which every task is then used. None: as the ``splits`` of ``fit`` said, or half of
                each task's rows.
            num_tasks: Number of tasks to draw from a sampler or an image folder; others are used once each.
            seed: Seed of the splits.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If ``num_support`` is given and the tasks are split already, as those of a sampler are.
            ValueError: If a task does not fit, or none has rows enough.

        Warns:
            RuntimeWarning: If there are too few tasks to know a temperature, or tasks with too few rows are left out.
        """
        self._fitted = calibrate_held_out(
            self.fitted_model,
            validation_tasks,
            self._splits,
            num_support=num_support,
            num_tasks=num_tasks,
            seed=seed,
            console=console_of(self.verbose),
        )
        return self

    def evaluate(
        self,
        test_tasks: Any,
        *,
        num_support: int | None = None,
        num_tasks: int = 600,
        seed: int = 0,
        out_of_task: bool = False,
    ) -> EvaluationReport:
        """Adapts to test tasks and reports metrics with 95% intervals over tasks.

        Args:
            test_tasks: Tasks in the form that ``fit`` took. Data, and sequences of Episodes, are used once each.
            num_support: Data: how many rows of a task will be known when the learner is used; for an image folder in
                all classes of a task together. None: as the ``splits`` of ``fit`` said, or half of each task's rows.
                ``learning_curve`` has several numbers beside each other.
            num_tasks: Number of tasks to draw from a sampler or an image folder.
            seed: Names the fixed set of tasks, or the splits.
            out_of_task: Where each task has classes of its own: whether queries of the next task, foreign to it, are
                predicted as well; see ``ibaml.train.evaluate.draw_foreign``. It nearly doubles the cost of queries.

        Returns:
            The scores of the likelihood's predictions (``ClassPrediction.scores``, ``MixturePrediction.scores``) in the
            units of the data; for classes ``ece_pooled`` and ``mce_pooled`` of all tasks together, and with
            ``out_of_task`` the probability ``out_of_task_auroc`` that a foreign query has the larger score. And of what
            tasks, with how many known rows: ``print`` shows it first.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If ``num_support`` is given and the tasks are split already, as those of a sampler are.
            ValueError: If a task does not fit, or has more classes than the model tells apart, or no classes of its own
                and ``out_of_task`` is asked for; if no task has rows enough.

        Warns:
            RuntimeWarning: If tasks with too few rows for ``num_support`` are left out, saying which.
        """
        found = self.evaluate_in_full(
            test_tasks, num_support=num_support, num_tasks=num_tasks, seed=seed, out_of_task=out_of_task
        )
        return EvaluationReport(found)

    def evaluate_in_full(
        self,
        test_tasks: Any,
        *,
        num_support: int | None = None,
        num_tasks: int = 600,
        seed: int = 0,
        out_of_task: bool = False,
        on_progress: Callable[[int], None] | None = None,
        processes: Processes | None = None,
    ) -> Evaluation:
        """Like ``evaluate``; returns the scores of each task and the predictions as well.

        Args:
            test_tasks: As in ``evaluate``.
            num_support: As there.
            num_tasks: As there.
            seed: As there.
            out_of_task: As there.
            on_progress: Called with the number of finished tasks, instead of the learner's own display.
            processes: The processes that share the tasks.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            ValueError, TypeError: As in ``evaluate``.
            FloatingPointError: If predictions are not finite, naming the task.
        """
        how: dict[str, Any] = {"out_of_task": out_of_task, "on_progress": on_progress, "processes": processes}
        how["console"] = console_of(self.verbose) if on_progress is None else None
        return evaluate_held_out(
            self.fitted_model,
            test_tasks,
            self._splits,
            self.classes,
            num_support=num_support,
            num_tasks=num_tasks,
            seed=seed,
            **how,
        )
