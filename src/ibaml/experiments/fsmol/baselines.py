"""What a chemist would do with a few measured molecules: neighbours, a random forest, logistic regression.

Each function learns from one support set alone and returns the probability that a query molecule is active. Settings
were chosen on held-out training assays. Probabilities are smoothed: a single certain miss would make the nll infinite.
"""

import numpy as np
import numpy.typing as npt
import torch

from ibaml.optional import require
from ibaml.types import Batch, Tensor

NUM_NEIGHBOURS = 5
NUM_TREES = 100
INVERSE_REGULARISATION = 0.1


def nearest_neighbours(support: Batch, x_query: Tensor, *, num_neighbours: int = NUM_NEIGHBOURS) -> Tensor:
    """Votes of the nearest neighbours, weighted by Tanimoto similarity, with one pseudo-vote for each class.

    Args:
        support: Fingerprints ``[num_support, num_features]``, of which only the nonzero entries matter, and labels.
        x_query: Query fingerprints.
        num_neighbours: Number of neighbours; all of the support set if it has fewer.

    Returns:
        Probabilities of the label 1, ``[num_queries]``.

    Examples:
        >>> x = torch.eye(2)
        >>> nearest_neighbours(Batch(x, torch.tensor([0, 1])), x, num_neighbours=1)
        tensor([0.3333, 0.6667])
    """
    have, wanted = (support.x > 0).float(), (x_query > 0).float()
    common = wanted @ have.T
    union = wanted.sum(1, keepdim=True) + have.sum(1) - common
    similarity, nearest = (common / union.clamp_min(1)).topk(min(num_neighbours, len(have)), dim=1)
    votes = (similarity * support.y[nearest]).sum(1)
    return (votes + 1) / (similarity.sum(1) + 2)


def random_forest(support: Batch, x_query: Tensor, *, seed: int = 0) -> Tensor:
    """A random forest of 100 trees of scikit-learn; one pseudo-tree for each class.

    Args:
        support: Fingerprints and labels.
        x_query: Query fingerprints.
        seed: Seed of the trees.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    ensemble = require("sklearn.ensemble", "scikit-learn", "experiments")
    forest = ensemble.RandomForestClassifier(NUM_TREES, random_state=seed).fit(support.x.numpy(), support.y.numpy())
    active = torch.from_numpy(np.asarray(forest.predict_proba(x_query.numpy())[:, 1], dtype=np.float32))
    return (NUM_TREES * active + 1) / (NUM_TREES + 2)


def logistic_regression(support: Batch, x_query: Tensor) -> Tensor:
    """Logistic regression of scikit-learn with a quadratic penalty.

    Args:
        support: Fingerprints and labels.
        x_query: Query fingerprints.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    linear = require("sklearn.linear_model", "scikit-learn", "experiments")
    model = linear.LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000).fit(support.x.numpy(), support.y.numpy())
    return torch.from_numpy(np.asarray(model.predict_proba(x_query.numpy())[:, 1], dtype=np.float32))


def average_precision(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """Area under the precision-recall curve by steps: ``sum (R_k - R_k-1) P_k`` over the distinct scores.

    Args:
        scores: Larger is more likely active.
        labels: 0 and 1, at least one of them 1.

    Raises:
        ValueError: If no label is 1.

    Examples:
        >>> average_precision(np.array([0.9, 0.8, 0.1]), np.array([1, 0, 1]))  # (1 + 2/3) / 2
        0.8333333333333333
    """
    num_active = int(labels.sum())
    if num_active == 0:
        raise ValueError("labels has no 1; average precision needs at least one active example.")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    # Ties share one threshold: only the last of each run of equal scores counts.
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    recall = hits[last] / num_active
    precision = hits[last] / (last + 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())
