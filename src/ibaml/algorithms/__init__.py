"""Algorithms: records of settings that adapt to a task and give the hypergradient of its outer loss.

``maml() ... ibaml()`` return one with the settings of its publication; every setting can be overridden.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ibaml.algorithms.base import Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.gradient_based import GradientBased
from ibaml.algorithms.heads import (
    GaussianClasses,
    GaussianProcess,
    GeneralizedLinear,
    Head,
    LinearGaussian,
    Neighbours,
    Prototypes,
    Ridge,
    Softmax,
)
from ibaml.algorithms.on_distribution import ABML, IBAML, VAMPIRE
from ibaml.algorithms.on_weights import FOMAML, IMAML, MAML
from ibaml.algorithms.reptile import Reptile
from ibaml.priors import COLUMN_PRIORS, PRIORS
from ibaml.solvers.inner import INNER_SOLVERS
from ibaml.solvers.linear import LINEAR_SOLVERS

ALGORITHMS: Mapping[str, type[Any]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "imaml": IMAML,
    "abml": ABML,
    "vampire": VAMPIRE,
    "ibaml": IBAML,
    "linear_gaussian": LinearGaussian,
    "gp": GaussianProcess,
    "generalized_linear": GeneralizedLinear,
    "softmax": Softmax,
    "gaussian_classes": GaussianClasses,
    "prototypes": Prototypes,
    "ridge": Ridge,
    "neighbours": Neighbours,
    "reptile": Reptile,
}

RECORDS: tuple[type, ...] = (
    *ALGORITHMS.values(),
    *INNER_SOLVERS.values(),
    *LINEAR_SOLVERS.values(),
    *PRIORS.values(),
    *COLUMN_PRIORS.values(),
)
"""All that an algorithm's settings may consist of, for ``ibaml.records.from_json``."""

_BY_NAME: Mapping[str, Mapping[str, type]] = {"inner": INNER_SOLVERS, "linear": LINEAR_SOLVERS, "prior": PRIORS}


def make_algorithm(name: str, **settings: Any) -> Algorithm:
    """Builds an algorithm by name.

    Args:
        name: One of ``ALGORITHMS``.
        **settings: Fields of its record. ``inner``, ``linear`` and ``prior`` may also be names, which stand for the
            solver or family with its own defaults.

    Raises:
        ValueError: If a name or a setting is unknown, or a value is out of range.

    Examples:
        >>> from ibaml.solvers.inner import Adam
        >>> make_algorithm("maml", inner=Adam(num_steps=20, learning_rate=0.1)).inner.num_steps
        20
        >>> make_algorithm("ibaml", linear="minres").linear
        MINRES(max_steps=5, rtol=1e-06, reorthogonalize=True)
    """
    record = _named("algorithm", name, ALGORITHMS)
    known = [field.name for field in dataclasses.fields(record)]
    for setting, value in settings.items():
        if setting not in known:
            nearest = difflib.get_close_matches(setting, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{name} has no setting {setting!r}; did you mean {nearest!r}? There are {', '.join(sorted(known))}."
            )
        if isinstance(value, str) and setting in _BY_NAME:
            settings = settings | {setting: _named(setting, value, _members(record, setting))()}
    return record(**settings)


def maml(**settings: Any) -> Algorithm:
    """MAML (Finn et al. 2017): learned initial weights, backpropagation through the inner steps."""
    return make_algorithm("maml", **settings)


def fomaml(**settings: Any) -> Algorithm:
    """First-order MAML (Finn et al. 2017): the query gradient at the adapted weights."""
    return make_algorithm("fomaml", **settings)


def imaml(**settings: Any) -> Algorithm:
    """The iMAML algorithm (Rajeswaran et al. 2019): proximal inner problem, implicit gradient."""
    return make_algorithm("imaml", **settings)


def abml(**settings: Any) -> Algorithm:
    """ABML (Ravi and Beatson 2019): learned Gaussian prior, unrolled; support and query nll and the KL outside."""
    return make_algorithm("abml", **settings)


def vampire(**settings: Any) -> Algorithm:
    """VAMPIRE (Nguyen et al. 2020): learned Gaussian prior, unrolled; only the query's expected nll outside."""
    return make_algorithm("vampire", **settings)


def ibaml(**settings: Any) -> Algorithm:
    """Implicit Bayesian meta-learning (Zhang et al. 2023): learned Gaussian prior, implicit gradient by Lemma 1."""
    return make_algorithm("ibaml", **settings)


def _members(record: type, setting: str) -> Mapping[str, type]:
    """Returns what a setting may be by name: the prior of a head is over columns."""
    return COLUMN_PRIORS if setting == "prior" and issubclass(record, Head) else _BY_NAME[setting]


def _named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, but is {name!r}.")
    return known[name]


__all__ = [
    "ABML",
    "ALGORITHMS",
    "FOMAML",
    "IBAML",
    "IMAML",
    "MAML",
    "Head",
    "LinearGaussian",
    "Neighbours",
    "RECORDS",
    "Reptile",
    "Prototypes",
    "Ridge",
    "Softmax",
    "VAMPIRE",
    "Algorithm",
    "GaussianClasses",
    "GaussianProcess",
    "GeneralizedLinear",
    "GradientBased",
    "MetaParameters",
    "TaskNoise",
    "abml",
    "fomaml",
    "ibaml",
    "imaml",
    "make_algorithm",
    "maml",
    "vampire",
]
