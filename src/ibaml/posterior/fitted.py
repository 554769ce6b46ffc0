"""A fitted model as a function of a task's data: adaptation and prediction."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.base import TaskNoise
from ibaml.algorithms.checks import explained_failures, require_finite_outputs, require_finite_solution
from ibaml.algorithms.heads.empirical_bayes import Experience
from ibaml.algorithms.heads.gaussian import MOST_JOINTLY, GaussianHead, JointMoments
from ibaml.algorithms.model import Model
from ibaml.algorithms.nll import Nll
from ibaml.backbones import Extractor
from ibaml.data.arrays import as_tensor
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.raw import RawInputs, check_raw, refuse_path
from ibaml.data.tables import Array
from ibaml.fast import NllInParts
from ibaml.likelihoods import ClassPrediction, Likelihood, MixturePrediction, Prediction
from ibaml.metrics import AbstentionCurve, Recalibration
from ibaml.posterior.task import TaskPosterior
from ibaml.seeds import noise_generator
from ibaml.types import Batch, InnerSolution, Params, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FittedModel:
    """All that adaptation and prediction need.

    Attributes:
        model: Network and likelihood.
        algorithm: What adapts.
        meta: The learned prior and shared parameters.
        preprocessing: How data become tensors; None if they come as tensors that fit the network.
        device: Where to compute.
        temperature: Calibration temperature, by which predictions are made less sure; losses are untouched.
        abstention: How often confident predictions of held-out tasks were wrong, at that temperature; for classes.
        recalibration: What ``calibrate`` found, if it was called; it is not stored with the model.
        experience: How many tasks the prior stands for, if that is known; where it can learn on from single tasks.
        step: Meta-step of ``meta``, if it comes from training.
        max_examples_per_pass: Pass at most so many support examples through the network at a time. None: no limit.
        raw_inputs: What tensors of training were like, if there is no preprocessing and it is known.
        backbone: What makes features of inputs, which are the data of ``preprocessing``; None: inputs are data.
    """

    model: Model
    algorithm: Algorithm
    meta: MetaParameters
    preprocessing: Preprocessing | None
    device: torch.device
    temperature: float = 1.0
    abstention: AbstentionCurve | None = None
    recalibration: Recalibration | None = None
    experience: Experience | None = None
    step: int | None = None
    max_examples_per_pass: int | None = None
    raw_inputs: RawInputs | None = None
    backbone: Extractor | None = None

    def encode(self, argument: str, x: Any) -> Tensor:
        """Returns inputs on the device, in the dtype of the weights.

        Raises:
            TypeError: If the inputs are no numbers, or of another kind than in training.
            ValueError: If they are not finite or of the wrong shape.

        Warns:
            RuntimeWarning: If values are far from those of training.
        """
        refuse_path(argument, x)
        if self.preprocessing is not None:
            if self.backbone is not None:
                shape = self.preprocessing.input_shape
                x = np.empty((0, *shape)) if _is_empty(x) else self.backbone.features(argument, x)
            return self.preprocessing.encode_inputs(argument, x, dtype=self.dtype).to(self.device)
        x = as_tensor(argument, x)
        if self.raw_inputs is not None and not _is_empty(x):
            check_raw(argument, x, self.raw_inputs)
        return x.to(device=self.device, dtype=self.dtype if x.is_floating_point() else None)

    def require_prior(self) -> None:
        """Refuses a task without examples where nothing says what is likely of it beforehand.

        Where the classes are known and the algorithm has a prior, the posterior of no examples is the prior.

        Raises:
            ValueError: Saying why, and what to do.
        """
        if not self.algorithm.is_bayesian:
            raise ValueError(
                f"the support is empty, and algorithm {self.algorithm.name!r} has no prior that says what is likely of "
                "a task without examples: give at least one, or use an algorithm with a prior, such as "
                "algorithm='head'."
            )
        has_labels = self.preprocessing is not None and self.preprocessing.class_labels is not None
        # Of tensors, priors that each belong to a class say that classes mean the same in all tasks.
        of_tensors = self.preprocessing is None and not self.algorithm.serves_any_number_of_outputs
        if self.model.likelihood.target_kind == "classes" and not has_labels and not of_tensors:
            raise ValueError(
                "the support is empty, and where each task has classes of its own nothing else says which they are: "
                "give at least one example of each class, or fit with classes='shared' if labels mean the same in all "
                "tasks."
            )

    def encode_support(
        self, x: Any, y: Any, labels: Array | None, *, names: tuple[str, str] = ("x_support", "y_support")
    ) -> Batch:
        """Returns the support set as tensors, checked; it may be empty.

        Args:
            x: Inputs.
            y: Labels or targets.
            labels: Label of each class, where there are any.
            names: How messages call inputs and targets.

        Raises:
            TypeError: If values are of the wrong kind.
            ValueError: If the examples do not fit the model.
        """
        inputs = self.encode(names[0], x)
        if _is_empty(y):
            if len(inputs) > 0:
                raise ValueError(
                    f"the task's support has {len(inputs)} inputs and no targets; expected as many of the one as of "
                    "the other."
                )
            return Batch(inputs, self._no_targets(inputs))
        if self.preprocessing is None:
            targets = as_tensor(names[1], y)
        else:
            targets = self.preprocessing.encode_targets(names[1], y, labels, dtype=self.dtype)
        support = Batch(inputs, targets.to(self.device))
        self.model.check_batch("the task's support", support, algorithm=self.algorithm)
        return support

    def _no_targets(self, inputs: Tensor) -> Tensor:
        likelihood, num_outputs = self.model.likelihood, self.model.num_outputs
        if likelihood.target_kind == "classes":
            return inputs.new_zeros(0, dtype=torch.int64)
        return inputs.new_zeros(0, num_outputs // likelihood.num_outputs(1), dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return tree.leaves(self.model.adapted)[0].dtype

    def num_outputs(self, num_outputs: int, *targets: Tensor) -> int:
        """Returns how many classes a task has where the algorithm serves any number, else the number of outputs.

        Args:
            num_outputs: Outputs of the network.
            *targets: Class indices of the task, which tell if no labels are known.
        """
        labels = None if self.preprocessing is None else self.preprocessing.class_labels
        if labels is not None and self.algorithm.serves_any_number_of_outputs:
            return len(labels)
        return self.model.most_outputs(self.algorithm, num_outputs, *targets)

    def labels_of(self, y: Any) -> Array | None:
        """Returns the class labels of a task; None for regression and for tensors."""
        if self.preprocessing is None or self.preprocessing.is_regression:
            return None
        any_number = self.algorithm.serves_any_number_of_outputs
        return self.preprocessing.labels_of_task("y_support", y, any_number=any_number)

    def adapt(self, x: Any, y: Any, *, seed: int) -> TaskPosterior:
        """Adapts to one task; see ``MetaLearner.adapt``."""
        if _is_empty(x) and _is_empty(y):
            self.require_prior()
        labels = self.labels_of(y)
        return self.solve(self.encode_support(x, y, labels), labels, seed=seed)

    def solve(
        self,
        support: Batch,
        labels: Array | None,
        *,
        seed: int,
        start: Any = None,
        with_grad_norm: bool = True,
        num_outputs: int | None = None,
    ) -> TaskPosterior:
        """Solves the inner problem of an encoded support set.

        Args:
            support: Support set on the device.
            labels: Label of each class, for predictions.
            seed: Seed of the noise of the inner problem.
            start: Where the inner solver starts. None: at the prior.
            with_grad_norm: False spares the gradient at the solution; its norm is then NaN.
            num_outputs: Classes of the task where any number is served. None: those that are known, or of the support.

        Raises:
            FloatingPointError: If the solution is not finite.
            TypeError: If the network does what functional derivatives do not support.
            MemoryError: If the support set does not fit into memory.
        """
        noise = self.inner_noise(seed=seed)
        with explained_failures(self.model.network, len(support.y)):
            nll, shared, x = self._view(support.x)
            if isinstance(nll, Model):
                if num_outputs is None:
                    num_outputs = self.num_outputs(nll.num_outputs, support.y)
                nll = dataclasses.replace(nll, num_outputs=num_outputs)
            with torch.no_grad():
                solution = self.algorithm.adapt(
                    nll,
                    MetaParameters(self.meta.prior, shared),
                    Batch(x, support.y),
                    noise,
                    start=start,
                    with_grad_norm=with_grad_norm,
                )
        require_finite_solution(self.algorithm, solution, support, with_norm=with_grad_norm)
        return TaskPosterior(
            self,
            solution.value,
            float(solution.grad_norm),
            num_support=len(support.y),
            support=None if self.algorithm.is_sequential else support,
            labels=labels,
            seed=seed,
        )

    def extend(self, posterior: Any, more: Batch) -> InnerSolution | None:
        """Returns a posterior after further encoded examples, from it alone; None if the algorithm takes all of them.

        Args:
            posterior: What the algorithm's ``adapt``, or this, returned.
            more: Further examples on the device.
        """
        if not self.algorithm.is_sequential:
            return None
        model, shared, x = self.on_features(more.x)
        nll = dataclasses.replace(model, num_outputs=self.num_outputs(model.num_outputs, more.y))
        with torch.no_grad():
            found = self.algorithm.update(nll, MetaParameters(self.meta.prior, shared), posterior, Batch(x, more.y))
        if found is not None:
            require_finite_solution(self.algorithm, found, more, with_norm=True)
        return found

    def _view(self, x: Tensor) -> tuple[Nll, Params, Tensor]:
        """Returns the losses of a task, the shared parameters and the inputs that they are functions of.

        Where the network's body is not adapted, its features are computed here, once.
        """
        if self.model.splits(x):
            return self.on_features(x)
        if self.max_examples_per_pass is None:
            return self.model, self.meta.shared, x
        return NllInParts(self.model, self.max_examples_per_pass, self.model.network), self.meta.shared, x

    def inner_noise(self, *, seed: int) -> TaskNoise:
        """Returns the noise of the inner problem that a seed names, on the device."""
        noise = self.algorithm.draw_noise(self.meta, generator=noise_generator("inner", seed))
        return tree.map(lambda leaf: leaf.to(self.device), noise)

    def evaluation_noise(self, *, seed: int) -> Params:
        """Returns the noise of the weight samples that a seed names, on the device."""
        noise = self.algorithm.draw_evaluation_noise(self.meta, generator=noise_generator("prediction", seed))
        return tree.map(lambda leaf: leaf.to(self.device), noise)

    def on_features(self, x: Tensor) -> tuple[Model, Params, Tensor]:
        """Returns the adapted part of the network, shared parameters with the features of inputs, and their positions.

        Args:
            x: Inputs on the device, of a network that splits into a body and its last layer.
        """
        # A network need not take an empty batch, nor one that has no variance.
        rows = x if len(x) else x.new_zeros(2, *x.shape[1:])
        size = len(rows) if self.max_examples_per_pass is None else self.max_examples_per_pass
        with torch.no_grad():
            features = torch.cat([self.model.features(self.meta.shared, part) for part in rows.split(size)])[: len(x)]
        shared = self.model.with_features(self.meta.shared, features)
        return self.model.on_features, shared, torch.arange(len(x), device=x.device)

    def outputs(self, posterior: Any, x: Tensor, *, seed: int) -> dict[str, Tensor]:
        """Returns what the likelihood makes a prediction of at encoded inputs; see ``Algorithm.outputs``.

        Args:
            posterior: What the algorithm's ``adapt`` returned.
            x: Inputs on the device.
            seed: Seed of the weight samples.
        """
        noise = self.evaluation_noise(seed=seed)
        network, shared = self.model, self.meta.shared
        if len(x) and self.model.splits(x):
            network, shared, x = self.on_features(x)
        with torch.no_grad():
            return self.algorithm.outputs(network, shared, posterior, x, noise)

    def prediction(self, outputs: dict[str, Tensor]) -> Prediction:
        """Returns the prediction that ``outputs`` make, tempered; numbers in the targets' units.

        Raises:
            FloatingPointError: If they are not finite.
        """
        require_finite_outputs(self.algorithm, outputs)
        with torch.no_grad():
            prediction = predicted(self.model.likelihood, self.meta.shared, outputs, self.temperature)
            if self.preprocessing is None or self.preprocessing.targets is None:
                return prediction
            mean, scale = self.preprocessing.targets.mean, self.preprocessing.targets.scale
            return prediction.rescaled(mean.to(self.device), scale.to(self.device))

    def predict(self, posterior: Any, x: Tensor, *, seed: int) -> Prediction:
        """Predicts at encoded inputs; numbers in the targets' units, whose samples can be drawn."""
        outputs = self.outputs(posterior, x, seed=seed)
        prediction = self.prediction(outputs)
        if not isinstance(prediction, MixturePrediction) or "output_variance" not in outputs:
            return prediction
        return dataclasses.replace(
            prediction, draw=lambda: self.draw(posterior, x, generator=noise_generator("prediction", seed))
        )

    def draw(self, posterior: Any, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Returns means of functions drawn from a posterior in closed form, ``[num_draws, num_examples, num_targets]``.

        Args:
            posterior: What the algorithm's ``adapt`` returned.
            x: Inputs on the device.
            generator: Source of randomness.
        """
        network, shared, inputs = self.on_features(x)
        drawn = self.algorithm.draw_outputs(network, shared, posterior, inputs, generator=generator)
        assert drawn is not None, f"{self.algorithm.name} gives moments and no draws"
        sampled = self.prediction({"outputs": drawn})
        assert isinstance(sampled, MixturePrediction)
        return sampled.components.mean

    @property
    def gaussian_head(self) -> GaussianHead:
        """The algorithm, whose posterior over functions is Gaussian.

        Raises:
            ValueError: If it is another.
        """
        if not isinstance(self.algorithm, GaussianHead):
            raise ValueError(
                "the joint distribution of several rows is known for heads with Gaussian noise alone, but the "
                f"algorithm is {self.algorithm.name!r}: use likelihood='gaussian' with algorithm='linear_gaussian' or "
                "'gp'."
            )
        return self.algorithm

    def joint_moments(self, posterior: Any, x: Tensor) -> JointMoments:
        """Returns the joint Gaussian of a task's function at encoded inputs, in the targets' units, tempered.

        It is differentiable in the inputs.

        Args:
            posterior: What the algorithm's ``adapt`` returned.
            x: Inputs on the device.

        Raises:
            ValueError: If the algorithm is none whose posterior over functions is Gaussian.
        """
        moments = self.gaussian_head.joint_moments(self.model, self.meta.shared, posterior, x)
        moments = moments.tempered(self.temperature)
        if self.preprocessing is None or self.preprocessing.targets is None:
            return moments
        targets, num_targets = self.preprocessing.targets, len(moments.noise)
        mean, scale = (value.to(self.device).expand(num_targets) for value in (targets.mean, targets.scale))
        return moments.rescaled(mean, scale)

    def joint_covariance(self, posterior: Any, x: Tensor) -> Tensor:
        """Returns the covariance of the targets at encoded inputs, ``[num_targets, num_examples, num_examples]``.

        Args:
            posterior: What the algorithm's ``adapt`` returned.
            x: Inputs on the device.

        Raises:
            ValueError: If the algorithm is none whose posterior over functions is Gaussian, or there are too many rows.
        """
        if len(x) > MOST_JOINTLY:
            raise ValueError(
                f"joint=True at {len(x)} rows takes the covariance of all pairs; expected at most {MOST_JOINTLY}: ask "
                "for fewer at a time."
            )
        with torch.no_grad():
            _, covariance, noise = self.joint_moments(posterior, x)
            return covariance + noise[:, None, None] * torch.eye(len(x), dtype=noise.dtype, device=noise.device)

    def min_confidence(self, max_error: float) -> float:
        """Returns the least confidence from which predictions are wrong no more often than a share; infinite for none.

        Args:
            max_error: Share in (0, 1).

        Raises:
            ValueError: If the share is out of range, predictions are of numbers, or the model is not calibrated.
        """
        if not 0 < max_error < 1:
            raise ValueError(f"max_error is {max_error}; expected a share strictly between 0 and 1, such as 0.05.")
        if self.model.likelihood.target_kind != "classes":
            raise ValueError(
                f"max_error is a share of wrong labels, but the likelihood {self.model.likelihood.name!r} predicts "
                "numbers: compare the width of prediction.interval() with the error that you can bear."
            )
        if self.abstention is None:
            raise ValueError(
                "max_error needs to know how often confident predictions are wrong: fit with validation tasks, or call "
                "learner.calibrate(validation_tasks) once, with tasks that training has not seen."
            )
        least = self.abstention.min_confidence(max_error)
        if least == math.inf:
            warnings.warn(
                f"no confidence keeps the error below max_error={max_error}: the model abstains on every example. The "
                f"least that the validation tasks can promise is {float(self.abstention.error_bound.min()):.3g}; more "
                "of them may lower it (learner.calibrate).",
                RuntimeWarning,
                stacklevel=3,
            )
        return least

    def in_units(self, targets: Tensor) -> Tensor:
        """Returns encoded targets as those of predictions: numbers in the units of the data, class indices as such."""
        if self.preprocessing is None or self.preprocessing.targets is None:
            return targets
        mean, scale = self.preprocessing.targets.mean, self.preprocessing.targets.scale
        return targets.double() * scale.to(targets.device) + mean.to(targets.device)


def predicted(likelihood: Likelihood, shared: Params, outputs: Mapping[str, Tensor], temperature: float) -> Prediction:
    """Returns the prediction that outputs make, in units of the encoded targets, tempered.

    Args:
        likelihood: Of the targets.
        shared: Holds its parameters.
        outputs: From ``Algorithm.outputs``.
        temperature: Calibration temperature.
    """
    prediction = likelihood.predict(outputs["outputs"], shared, output_variance=outputs.get("output_variance"))
    if isinstance(prediction, ClassPrediction) and "out_of_task" in outputs:
        prediction = dataclasses.replace(prediction, out_of_task_score=outputs["out_of_task"])
    return prediction if temperature == 1 else prediction.tempered(temperature)


def _is_empty(values: Any) -> bool:
    return hasattr(values, "__len__") and len(values) == 0
