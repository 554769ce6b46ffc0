"""Classes: probabilities by softmax."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch

from ibaml import metrics
from ibaml.likelihoods.base import Array, Prediction, TargetKind, as_frame, shown, shown_range, wide
from ibaml.metrics import Estimate
from ibaml.types import Params, Tensor

_MOST_SHOWN = 6

_MANY_CLASSES = 16
"""From so many on, classes are as well normalised where they lie."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClassPrediction:
    """Class probabilities at some inputs.

    Attributes:
        sample_log_probs: Log-probabilities under each weight sample, ``[num_samples, num_examples, num_classes]``.
        temperature: Divides the log of the averaged probabilities; positive, above 1 less sure, below 1 surer.
        classes: Label of each column of ``probs``; None: the index of the column.
        as_numpy: Whether values are numpy arrays.
        out_of_task_score: What ``out_of_task`` shows; None if there is nothing but probabilities.
        min_confidence: The least confidence with which an example is answered, infinite for none; None: all are.
        row_index: Labels of the rows of the table that was asked of, for ``to_frame``; None: 0, 1, ...
    """

    sample_log_probs: Tensor
    temperature: float = 1.0
    classes: Array | None = None
    as_numpy: bool = False
    out_of_task_score: Tensor | None = None
    min_confidence: float | None = None
    row_index: Any = None

    def __repr__(self) -> str:
        """Shows how many rows there are, the classes that are predicted, and how sure."""
        num_rows = self.sample_log_probs.shape[1]
        if not num_rows:
            return "ClassPrediction(0 rows)"
        index, counts = self._log_probs.argmax(-1).unique(return_counts=True)
        names = index.tolist() if self.classes is None else self.classes[index.cpu().numpy()].tolist()
        found = [f"{count} x {name}" for name, count in zip(names, counts.tolist(), strict=True)]
        found = [*found[:_MOST_SHOWN], "..."] if len(found) > _MOST_SHOWN else found
        return f"ClassPrediction({num_rows} rows: {', '.join(found)}; confidence {shown_range(self._confidence)})"

    @property
    def log_probs(self) -> Any:
        """Log of the averaged and tempered probabilities, ``[num_examples, num_classes]``."""
        return self._shown(self._log_probs)

    @property
    def probs(self) -> Any:
        """Probabilities averaged over weight samples and tempered, ``[num_examples, num_classes]``."""
        return self._shown(self._log_probs.exp())

    @property
    def labels(self) -> Any:
        """Most probable class, ``[num_examples]``: its label, or its index; a numpy array if labels are strings."""
        index = self._log_probs.argmax(-1)
        if self.classes is None:
            return self._shown(index)
        chosen = self.classes[index.cpu().numpy()]
        return torch.from_numpy(chosen) if not self.as_numpy and chosen.dtype.kind in "biuf" else chosen

    @property
    def total_uncertainty(self) -> Any:
        """Entropy of ``probs`` in nats, ``[num_examples]``."""
        return self._shown(_entropy(self._log_probs))

    @property
    def aleatoric(self) -> Any:
        """What more data would not remove, in nats, ``[num_examples]``: the mean entropy of the samples' probabilities.

        With a temperature: the same share of the total as without.
        """
        return self._shown((_entropy(self._log_probs) - self._information).clamp_min(0))

    @property
    def epistemic(self) -> Any:
        """Mutual information of label and weights in nats, ``[num_examples]``, at least 0.

        With a temperature: the same share of the total as without.
        """
        return self._shown(self._information)

    @property
    def out_of_task(self) -> Any:
        """How little an example looks like one of any class of the task, ``[num_examples]``; larger is more foreign.

        Its scale is that of the algorithm, and no temperature changes it: a threshold has to be found on other tasks.

        Raises:
            ValueError: If the prediction was made of probabilities alone, which do not tell.
        """
        if self.out_of_task_score is None:
            raise ValueError("this prediction was made of probabilities alone, which have no out-of-task score.")
        return self._shown(self.out_of_task_score)

    @property
    def confidence(self) -> Any:
        """Largest of the ``probs``, float64, ``[num_examples]``."""
        return self._shown(self._confidence)

    @property
    def abstains(self) -> Any:
        """Whether the model leaves an example to somebody else, bool, ``[num_examples]``; False without ``max_error``.

        The label that it would have given is in ``labels`` all the same.
        """
        least = -math.inf if self.min_confidence is None else self.min_confidence
        return self._shown(self._confidence < least)

    def samples(self) -> Any:
        """Returns the untempered probabilities under each sample, ``[num_samples, num_examples, num_classes]``."""
        return self._shown(self.sample_log_probs.exp())

    def nll(self, targets: Any) -> Any:
        """Returns ``-log p(target)`` per example in nats.

        Args:
            targets: Labels, or class indices if the prediction has no labels, ``[num_examples]``.

        Raises:
            ValueError: If a label is none of ``classes``.
        """
        index = torch.as_tensor(targets if self.classes is None else _indices(np.asarray(targets), self.classes))
        index = index.to(self.sample_log_probs.device)
        return self._shown(-self._log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1))

    def log_prob(self, targets: Any) -> Any:
        """Returns ``log p(target)`` per example in nats; arguments and errors as of ``nll``."""
        return -self.nll(targets)

    def tempered(self, temperature: float) -> "ClassPrediction":
        """Returns the prediction with the logits of its probabilities divided by a temperature (Guo et al. 2017).

        Those are the probabilities averaged over weight samples: dividing each sample's logits would hardly change
        what is unsure because the samples disagree.

        Args:
            temperature: Positive; above 1 it makes the prediction less sure.
        """
        return dataclasses.replace(self, temperature=self.temperature * temperature)

    def rescaled(self, mean: Tensor, scale: Tensor) -> "ClassPrediction":
        """Returns the prediction itself: classes have no scale."""
        del mean, scale
        return self

    def to(self, device: torch.device) -> "ClassPrediction":
        """Returns the prediction with its tensors on a device."""
        score = None if self.out_of_task_score is None else self.out_of_task_score.to(device)
        return dataclasses.replace(self, sample_log_probs=self.sample_log_probs.to(device), out_of_task_score=score)

    def in_terms_of(self, *, labels: Array | None, is_vector: bool, as_numpy: bool) -> "ClassPrediction":
        """Returns the prediction with the labels of the data, as tensors or numpy arrays."""
        del is_vector
        labels = np.arange(self.sample_log_probs.shape[-1]) if labels is None else labels
        return dataclasses.replace(self, classes=labels, as_numpy=as_numpy)

    @classmethod
    def joined(cls, predictions: Sequence["ClassPrediction"], rows: Sequence[Tensor]) -> "ClassPrediction":
        """Returns the predictions of tasks with classes of their own as one of the classes of all.

        A class that a task does not have has the probability zero there. Labels of different kinds are different
        classes, as the number 1 and the text "1" are. Other settings are those of the first.

        Args:
            predictions: Predictions with labels.
            rows: Where the examples of each go in the whole; together they are ``0, 1, ...`` in some order.

        Raises:
            ValueError: If they differ in their number of samples.
        """
        labels = [cast(Array, one.classes) for one in predictions]
        classes, places = _all_labels(labels)
        numbers = sorted({len(one.sample_log_probs) for one in predictions})
        if len(numbers) > 1:
            raise ValueError(
                f"tasks have predictions of {' and '.join(map(str, numbers))} samples, which cannot be joined: set "
                "num_evaluation_samples to at least four for each class of the largest task, by "
                "learner.adapting_with(dataclasses.replace(learner.algorithm, num_evaluation_samples=...))."
            )
        parts: list[Tensor] = []
        for one, place in zip(predictions, places, strict=True):
            values = one.sample_log_probs
            whole = values.new_full((*values.shape[:-1], len(classes)), -math.inf)
            whole[..., torch.from_numpy(place).to(values.device)] = values
            parts.append(whole)
        scores = [one.out_of_task_score for one in predictions if one.out_of_task_score is not None]
        order = torch.cat(list(rows)).argsort().to(parts[0].device)
        return dataclasses.replace(
            predictions[0],
            sample_log_probs=torch.cat(parts, 1)[:, order],
            classes=classes,
            out_of_task_score=torch.cat(scores)[order] if scores else None,
        )

    def scores(self, targets: Tensor) -> dict[str, Tensor]:
        """Returns the scores of one task by name; ``ibaml.metrics`` defines them."""
        return {name: value[0] for name, value in class_scores(self._normalised[None], targets[None]).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Returns ``log_probs``, and ``out_of_task`` if there is such a score, in float64."""
        found = {"log_probs": self._normalised.cpu()}
        if self.out_of_task_score is not None:
            found["out_of_task"] = self.out_of_task_score.double().cpu()
        return found

    def columns(self, *, level: float, names: Sequence[str]) -> dict[str, list[Any]]:
        """Returns predicted label, probabilities, entropy and its epistemic part, and what there is of the rest.

        That is the out-of-task score, and whether the model abstains if it was allowed to.
        """
        del level, names
        prediction = self if self.classes is not None else self.in_terms_of(labels=None, is_vector=False, as_numpy=True)
        labels = cast(Array, prediction.classes).tolist()
        probs = {f"probability_{label}": prediction.probs[:, index] for index, label in enumerate(labels)}
        parts = {"entropy": prediction.total_uncertainty, "epistemic": prediction.epistemic}
        if prediction.out_of_task_score is not None:
            parts["out_of_task"] = prediction.out_of_task
        if prediction.min_confidence is not None:
            parts["abstains"] = prediction.abstains
        return {name: value.tolist() for name, value in {"predicted": prediction.labels, **probs, **parts}.items()}

    def to_frame(self, *, level: float = 0.9, names: Sequence[str] | None = None, index: Any = None) -> Any:
        """Returns ``columns`` as a pandas DataFrame; see ``Prediction``."""
        return as_frame(self.columns(level=level, names=names or ()), self.row_index if index is None else index)

    @property
    def _log_probs(self) -> Tensor:
        averaged = self._averaged_log_probs
        return averaged if self.temperature == 1 else torch.log_softmax(averaged / self.temperature, dim=-1)

    @functools.cached_property
    def _averaged_log_probs(self) -> Tensor:
        return torch.logsumexp(self.sample_log_probs, dim=0) - math.log(self.sample_log_probs.shape[0])

    @functools.cached_property
    def _normalised(self) -> Tensor:
        """Log-probabilities in float64 whose rows sum to one in float64 as well."""
        return torch.log_softmax(self._log_probs.double(), -1)

    @property
    def _confidence(self) -> Tensor:
        return self._normalised.exp().amax(-1)

    @property
    def _information(self) -> Tensor:
        before = _entropy(self._averaged_log_probs)
        information = (before - _entropy(self.sample_log_probs).mean(0)).clamp_min(0)
        if self.temperature == 1:
            return information
        return information * _entropy(self._log_probs) / torch.where(before > 0, before, torch.ones_like(before))

    def _shown(self, value: Tensor) -> Any:
        return shown(value, as_numpy=self.as_numpy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical:
    """Class probabilities by softmax: ``p(y | f) = softmax(f)_y``."""

    name: ClassVar[str] = "categorical"
    target_kind: ClassVar[TargetKind] = "classes"
    step_score_name: ClassVar[str] = "accuracy"

    def num_outputs(self, num_targets: int) -> int:
        """Returns one output per class."""
        return num_targets

    def with_outputs(self, num_outputs: int) -> "Categorical":
        """Returns itself: any number of classes will do."""
        del num_outputs
        return self

    def suited_to(self, targets: Tensor) -> "Categorical":
        """Returns itself: there is nothing to start."""
        del targets
        return self

    def initial_parameters(self) -> Params:
        """Returns no parameters."""
        return {}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns the cross-entropy per example.

        Args:
            outputs: Logits, ``[..., num_examples, num_classes]``.
            targets: Class indices, ``[..., num_examples]``, or fewer leading axes for the same of all.
            parameters: Not used.

        Raises:
            ValueError: If there is not one target for each example: a label would be compared with other examples.
        """
        del parameters
        if targets.ndim >= outputs.ndim or outputs.shape[:-1][-targets.ndim :] != targets.shape:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, but outputs are of examples {tuple(outputs.shape[:-1])}: "
                "expected one class index for each."
            )
        (outputs,) = wide(outputs)
        log_probs = torch.log_softmax(outputs, dim=-1)
        # A comparison rather than `one_hot`, which reads its values and so fails under vmap, or `gather`, whose
        # derivative scatters.
        is_target = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
        return -torch.where(is_target, log_probs, 0.0).sum(-1)

    def predict(self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None) -> ClassPrediction:
        """Returns class probabilities from logits of shape ``[num_samples, num_examples, num_classes]``.

        Raises:
            ValueError: If a variance is given: a softmax of Gaussian logits has no closed form.
        """
        del parameters
        if output_variance is not None:
            raise ValueError("output_variance: the categorical likelihood takes samples of logits, not their variance.")
        (outputs,) = wide(outputs)
        return ClassPrediction(_log_softmax(outputs), out_of_task_score=out_of_task_score(outputs))

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that are no class indices in ``[0, num_outputs)``.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(
                f"{argument} has dtype {targets.dtype}, but expected class indices (int64); "
                "for real targets use likelihood='gaussian'."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_outputs:
            raise ValueError(
                f"{argument} has labels from {low} to {high}, but the network has {num_outputs} outputs: "
                f"expected labels in 0 .. {num_outputs - 1}. Renumber the classes of each task, or give the network "
                "more outputs."
            )

    def step_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the accuracy."""
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()

    def pooled_scores(self, predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Mapping[str, Estimate]:
        """Returns the calibration errors of the examples of all tasks together, each of the same weight."""
        probs = [one.tensors()["log_probs"].exp() for one in predictions]
        # Seeded: a report is a function of its inputs.
        pooled = {"ece_pooled": metrics.pooled_ece, "mce_pooled": metrics.pooled_mce}
        return {
            name: function(probs, targets, generator=torch.Generator().manual_seed(0))
            for name, function in pooled.items()
        }


def _log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities over the last axis; of few classes they are sooner computed over another."""
    if logits.shape[-1] >= _MANY_CLASSES:
        return torch.log_softmax(logits, -1)
    return torch.log_softmax(logits.mT, -2).mT


def class_scores(log_probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns the scores of tasks of one shape by name, each ``[num_tasks]``; ``ibaml.metrics`` defines them.

    Args:
        log_probs: Float64, ``[num_tasks, num_examples, num_classes]``.
        labels: Class indices, ``[num_tasks, num_examples]``.
    """
    probs = log_probs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    return {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.nll(log_probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels),
        "mce": metrics.mce(probs, labels),
        "selective_area": metrics.selective_area(entropy, probs.argmax(-1) == labels.to(probs.device)),
    }


def out_of_task_score(logits: Tensor) -> Tensor:
    """Returns how foreign examples look to all classes: ``log(variance of the logits) - (largest mean logit)``.

    The variance is that between weight samples, of logits less their mean over classes, averaged over classes; its term
    is left out if there is one sample. On validation tasks of glyphs (5-way 5-shot; AUROC, queries of other tasks) it
    was ahead of what is in use: minus the logsumexp of mean logits (energy, Liu et al. 2020), the entropy.

    | | energy | minus the largest logit | entropy | this |
    |---|---|---|---|---|
    | softmax | 0.713 | 0.736 | 0.730 | 0.912 |

    Args:
        logits: Under each weight sample, ``[num_samples, num_examples, num_classes]``.
    """
    score = -logits.mean(0).amax(-1)
    if len(logits) == 1:
        return score
    logits = logits - logits.mean(-1, keepdim=True)
    # `var` over the first axis takes ten times as long.
    variance = (logits - logits.mean(0)).square().mean((0, -1))
    return score + torch.log(variance.clamp_min(torch.finfo(variance.dtype).tiny))


def _indices(targets: Array, classes: Array) -> Array:
    found = targets[:, None] == classes
    if not bool(found.any(1).all()):
        unknown = targets[~found.any(1)][0]
        raise ValueError(f"targets has the label {unknown.item()!r}; expected one of {classes.tolist()}.")
    return found.argmax(1)


def _all_labels(labels: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Returns the labels of all, each once and in order, and the places of those of each."""
    kinds = {"number" if own.dtype.kind in "iuf" else own.dtype.kind for own in labels}
    if len(kinds) == 1:
        joint = np.unique(np.concatenate(labels))
        return joint, [np.searchsorted(joint, own) for own in labels]
    # Put into one array as they are, the number 1 would become the text "1".
    keys = [[(type(label).__name__, label) for label in own.tolist()] for own in labels]
    ordered = sorted(set().union(*keys))
    place_of = {key: place for place, key in enumerate(ordered)}
    joint = np.empty(len(ordered), dtype=object)
    joint[:] = [label for _, label in ordered]
    return joint, [np.array([place_of[key] for key in own]) for own in keys]


def _entropy(log_probs: Tensor) -> Tensor:
    """Returns the entropy over the last axis; a probability of zero counts as zero."""
    return -torch.where(log_probs > -math.inf, log_probs.exp() * log_probs, 0.0).sum(-1)
