"""Scores of class probabilities, one value per task.

``probs`` and ``log_probs`` have shape ``[num_tasks, num_examples, num_classes]`` and rows that are distributions;
``labels`` are class indices in ``[0, num_classes)``, ``[num_tasks, num_examples]``.
"""

import torch

from ibaml.metrics import checked
from ibaml.types import Tensor


def accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    """Fraction of examples whose most probable class is the right one; of equal probabilities the first class counts.

    Examples:
        >>> accuracy(torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]), torch.tensor([[0, 0]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities.
        labels: Class indices.

    Returns:
        Accuracy of each task, in ``[0, 1]``.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a label is out of range, or a row is no distribution.
    """
    probs, labels = checked.probabilities(probs, labels)
    # argmax is documented to take the first maximum.
    return (probs.argmax(-1) == labels).to(torch.float64).mean(-1)


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood ``-(1/n) sum_i log p(y_i | x_i)`` in nats.

    It takes log-probabilities, which stay finite where a probability rounds to zero. Plain probabilities are refused:
    pass ``probs.log()``. A label that was given probability zero makes the task's value infinite.

    Examples:
        >>> nll(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log(), torch.tensor([[0, 1]]))
        tensor([0.6931], dtype=torch.float64)

    Args:
        log_probs: Predictive log-probabilities in nats.
        labels: Class indices.

    Returns:
        Nats per example of each task.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a label is out of range, or a row is no distribution.
    """
    log_probs, labels = checked.log_probabilities(log_probs, labels)
    return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Brier score ``(1/n) sum_i sum_c (p_ic - [y_i = c])^2``: summed over classes, averaged over examples.

    This is the original convention (Brier 1950), in ``[0, 2]``; with two classes it is twice the score of the
    single-probability convention.

    Examples:
        >>> brier(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities.
        labels: Class indices.

    Returns:
        Brier score of each task.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a label is out of range, or a row is no distribution.
    """
    probs, labels = checked.probabilities(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return ((probs - one_hot) ** 2).sum(-1).mean(-1)
