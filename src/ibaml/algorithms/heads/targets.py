"""What heads for classes share: indicators of classes, and the check of their number."""

import torch

from ibaml.algorithms.nll import Nll
from ibaml.types import Tensor


def indicators(targets: Tensor, num_classes: int, *, like: Tensor) -> Tensor:
    """Returns 1 where an example is of a class and 0 elsewhere, ``[num_classes, num_examples]``.

    Args:
        targets: Class indices, ``[num_examples]``.
        num_classes: Classes, of which some may have no example.
        like: Gives the dtype.
    """
    # A comparison rather than `one_hot`, which reads its values and so fails under vmap.
    return (torch.arange(num_classes, device=targets.device).unsqueeze(-1) == targets).to(like.dtype)


def require_classes(num_classes: int, num_priors: int, *, tied: bool) -> None:
    """Refuses a task of another number of classes than there are priors, unless one prior serves all.

    Args:
        num_classes: Classes of the task.
        num_priors: Priors that were learned.
        tied: Whether one serves all.

    Raises:
        ValueError: If the numbers differ.
    """
    if not tied and num_classes != num_priors:
        raise ValueError(
            f"the task has {num_classes} classes, but there are priors for {num_priors}: classes that each have a "
            "prior of their own are those of training; for others use a tied prior."
        )


def require_likelihood_of_classes(nll: Nll, name: str) -> None:
    """Refuses targets that are numbers for a head that knows classes.

    Args:
        nll: Nll of the examples; one without a likelihood may be of anything.
        name: Name of the head.

    Raises:
        ValueError: If the likelihood is of numbers.
    """
    likelihood = getattr(nll, "likelihood", None)
    if likelihood is not None and likelihood.target_kind != "classes":
        raise ValueError(
            f"algorithm {name!r} tells classes apart, but the likelihood {likelihood.name!r} is of numbers: use "
            "likelihood='categorical', or a head for numbers such as algorithm='linear_gaussian'."
        )
