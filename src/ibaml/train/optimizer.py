"""The outer optimiser: which meta-parameters move at which rate."""

from collections.abc import Collection
from typing import Any

from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.likelihoods import Likelihood
from ibaml.train.settings import TrainerSettings
from ibaml.types import Tensor


def parameter_groups(
    meta: MetaParameters,
    algorithm: Algorithm,
    likelihood: Likelihood,
    settings: TrainerSettings,
    *,
    fine_tuned: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Returns the groups for ``torch.optim``: what says where, and what says how wide on a logarithmic scale.

    Args:
        meta: Meta-parameters.
        algorithm: Tells the two kinds in its prior apart.
        likelihood: Its own parameters are logarithms, as of a noise variance.
        settings: Hold the learning rates.
        fine_tuned: Names of shared parameters that were learned before, on other data.
    """
    places, widths = algorithm.parameter_groups(meta.prior)
    of_likelihood = likelihood.initial_parameters().keys()
    tuned: list[Tensor] = []
    for name, value in meta.shared.items():
        (tuned if name in fine_tuned else widths if name in of_likelihood else places).append(value)
    groups = [_group(places, settings.learning_rate)]
    if widths:
        groups.append(_group(widths, settings.log_var_learning_rate or settings.learning_rate))
    if tuned:
        groups.append(_group(tuned, settings.fine_tune_learning_rate))
    return groups


def _group(parameters: list[Tensor], learning_rate: float) -> dict[str, Any]:
    return {"params": parameters, "lr": learning_rate, "initial_lr": learning_rate}
