"""The outer optimiser: which meta-parameters move at which rate, and which of them decay."""

from typing import Any

from torch import nn

from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.model import Model
from ibaml.backbones import FineTuned
from ibaml.train.settings import TrainerSettings
from ibaml.types import Tensor


def parameter_groups(
    meta: MetaParameters, algorithm: Algorithm, model: Model, settings: TrainerSettings
) -> list[dict[str, Any]]:
    """Returns the groups for ``torch.optim``: what says where, and what says how wide on a logarithmic scale.

    Args:
        meta: Meta-parameters.
        algorithm: Tells the two kinds in its prior apart.
        model: Its network says which parameters are weights that decay, and which were learned before on other data;
            those of its likelihood are logarithms, as of a noise variance.
        settings: Hold the learning rates and the weight decay.

    Raises:
        ValueError: If weights are to decay and none is shared.
    """
    places, widths = algorithm.parameter_groups(meta.prior)
    network, of_likelihood = model.network, model.likelihood.initial_parameters().keys()
    fine_tuned = network.learned if isinstance(network, FineTuned) else frozenset[str]()
    decaying = decaying_weights(network) if settings.weight_decay else frozenset[str]()
    tuned, weights, tuned_weights = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, value in meta.shared.items():
        if name in fine_tuned:
            (tuned_weights if name in decaying else tuned).append(value)
        elif name in of_likelihood:
            widths.append(value)
        else:
            (weights if name in decaying else places).append(value)
    if settings.weight_decay and not weights and not tuned_weights:
        raise ValueError(
            f"weight_decay is {settings.weight_decay}, but no weight of the network ({type(network).__name__}) is "
            "shared by the tasks and learned: leave it out, or adapt fewer layers, such as adapt='head.*'."
        )
    decay = settings.weight_decay or 0.0
    groups = [
        _group(places, settings.learning_rate),
        _group(widths, settings.log_var_learning_rate or settings.learning_rate),
        _group(tuned, settings.fine_tune_learning_rate),
        _group(weights, settings.learning_rate, decay),
        _group(tuned_weights, settings.fine_tune_learning_rate, decay),
    ]
    # One group is always there: a run may have nothing to move.
    return [group for index, group in enumerate(groups) if index == 0 or group["params"]]


def decaying_weights(network: nn.Module) -> frozenset[str]:
    """Returns the names of weights that a decay makes smaller: with two axes or more, and of no normalisation layer.

    Args:
        network: The network.

    Examples:
        >>> sorted(decaying_weights(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm((4, 3)))))
        ['0.weight']
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # pyright: ignore[reportPrivateUsage]
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, layer in network.named_modules()
        if not isinstance(layer, norms)
        for name, value in layer.named_parameters(recurse=False)
        if value.ndim > 1
    )


def _group(parameters: list[Tensor], learning_rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": parameters, "lr": learning_rate, "initial_lr": learning_rate, "weight_decay": weight_decay}
