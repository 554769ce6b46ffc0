"""Likelihoods: how network outputs and targets become an nll per example, a prediction and its scores.

| name | targets | prediction |
|---|---|---|
| `categorical` | classes | class probabilities |
| `gaussian` | real numbers | mixture of Gaussians; noise of one learned variance, or at every input its own |
| `unit_gaussian` | real numbers | mixture of Gaussians of variance one, for methods published for the squared error |
| `student_t` | real numbers with outliers | mixture of Student t distributions |
| `poisson` | counts | mixture of Poisson distributions |
| `negative_binomial` | counts that vary more | mixture of negative binomial distributions |

A likelihood may own parameters that are meta-learned for all tasks together (the noise of a regression). They live in
the ``shared`` meta-parameters under names that start with ``likelihood.``. A further likelihood is one file with a
frozen dataclass that satisfies ``Likelihood``, and one line in ``LIKELIHOODS``.
"""

from collections.abc import Mapping
from typing import Any

from ibaml.likelihoods.base import Array, Likelihood, Prediction, TargetKind
from ibaml.likelihoods.categorical import Categorical, ClassPrediction
from ibaml.likelihoods.gaussian import Gaussian, GaussianComponents, UnitGaussian
from ibaml.likelihoods.mixture import Components, MixturePrediction
from ibaml.likelihoods.negative_binomial import NegativeBinomial, NegativeBinomialComponents
from ibaml.likelihoods.poisson import Poisson, PoissonComponents
from ibaml.likelihoods.student_t import StudentT, StudentTComponents

__all__ = [
    "LIKELIHOODS",
    "Array",
    "Categorical",
    "ClassPrediction",
    "Components",
    "Gaussian",
    "GaussianComponents",
    "Likelihood",
    "MixturePrediction",
    "NegativeBinomial",
    "NegativeBinomialComponents",
    "Poisson",
    "PoissonComponents",
    "Prediction",
    "StudentT",
    "StudentTComponents",
    "TargetKind",
    "UnitGaussian",
    "find_likelihood",
    "make_likelihood",
]

LIKELIHOODS: Mapping[str, type[Any]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "unit_gaussian": UnitGaussian,
    "student_t": StudentT,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
"""Likelihoods by name."""


def find_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Returns a likelihood by name, with its default settings, or the likelihood itself.

    Raises:
        ValueError: If the name is unknown.
    """
    if not isinstance(likelihood, str):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, but is {likelihood!r}.")
    return LIKELIHOODS[likelihood]()


def make_likelihood(likelihood: str | Likelihood, num_outputs: int) -> Likelihood:
    """Returns a likelihood for a network of so many outputs.

    Args:
        likelihood: A name, for the default settings, or a likelihood.
        num_outputs: Outputs of the network.

    Raises:
        ValueError: If the name is unknown, or the outputs cannot be shared out among targets.

    Examples:
        >>> make_likelihood("gaussian", 2)
        Gaussian(num_targets=2, initial_noise_variance=1.0, heteroscedastic=False)
    """
    return find_likelihood(likelihood).with_outputs(num_outputs)
