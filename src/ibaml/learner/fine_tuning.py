"""Learning a backbone's parameters together with the prior of the head on its features."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ibaml.algorithms import Algorithm
from ibaml.algorithms.model import num_outputs_of
from ibaml.backbones import Extractor, FineTuned, FineTunedInputs, named_backbone, restore_inputs
from ibaml.data.prepare import Source
from ibaml.data.standardizer import IDENTITY
from ibaml.learner import defaults
from ibaml.learner.defaults import Suited
from ibaml.learner.features import prepare_features, without_augmentation
from ibaml.learner.folder import StoredModel
from ibaml.likelihoods import find_likelihood
from ibaml.types import Tensor

if TYPE_CHECKING:
    from rich.console import Console

TRAINER = dataclasses.replace(defaults.FEATURE_TRAINER, fine_tune_learning_rate=1e-4)
"""Outer loop for a head on features that move a little."""


class Tuning(NamedTuple):
    """What a training of a backbone's parameters starts from.

    Attributes:
        inputs: Makes the network's inputs.
        source: The tasks in these.
        suited: The network, the head and the likelihood.
    """

    inputs: FineTunedInputs
    source: Source
    suited: Suited


def tuning(
    extractor: Extractor,
    patterns: Sequence[str],
    tasks: Any,
    validation: Any,
    *,
    parameters: Mapping[str, Any],
    algorithm: Algorithm,
    console: "Console | None",
    how: Mapping[str, Any],
) -> Tuning:
    """Prepares the tasks of a backbone whose parameters are learned in part.

    The features before that, of images as they are, give what stays fixed: their scales, and whether square roots are
    taken.

    Args:
        extractor: The backbone on a device.
        patterns: Of the names of parameters that are learned.
        tasks: As of ``prepare_features``.
        validation: As there.
        parameters: Arguments of the learner.
        algorithm: What the name of an algorithm stands for.
        console: Where progress is shown, if anywhere.
        how: Further arguments of ``prepare_features``.

    Raises:
        TypeError: If tasks are of no accepted form, or text.
        ValueError: If they do not fit, a pattern matches nothing, the learner has a network of its own, or no gradient
            reaches what is to be learned.
    """
    if parameters["network"] is not None:
        raise ValueError(
            "network stands on the features of a frozen backbone, and with fine_tune the network is the backbone with "
            "one linear layer: leave one of the two out."
        )
    inputs = FineTunedInputs(extractor, patterns)
    plain, splits = without_augmentation(tasks, how["splits"])
    of_plain: dict[str, Any] = {**how, "splits": splits}
    frozen = prepare_features(extractor, plain, validation, console=console, **of_plain)
    assert frozen.preprocessing is not None
    inputs.square_root = extractor.square_root
    unscaled = dataclasses.replace(frozen.preprocessing, inputs=IDENTITY)
    source = prepare_features(inputs, tasks, validation, preprocessing=unscaled, **how)
    candidates = defaults.suited_to(frozen.train, parameters, algorithm)
    names = (defaults.ON_FEATURES, defaults.LINE, defaults.BOTH)
    base = candidates[next(name for name in names if name in candidates)]
    scale = frozen.preprocessing.inputs
    network = _network(inputs, num_outputs_of(base.network), scale.mean, scale.inverse_scale)
    _require_gradient(network, source)
    with torch.no_grad():
        network.head.bias.copy_(base.network.get_parameter("head.bias"))
    return Tuning(inputs, source, Suited(network, base.algorithm, base.likelihood, defaults.HEAD_PATTERN, TRAINER))


def _require_gradient(network: FineTuned, source: Source) -> None:
    """Refuses a backbone that cuts its output off from all parameters that are to be learned."""
    first = source.train.sample(1, generator=torch.Generator().manual_seed(0)).support.x[0, :2]
    with torch.enable_grad():
        features = network.features(first)
    if not features.requires_grad:
        raise ValueError(
            f"fine_tune names {', '.join(sorted(network.learned))}, but what the backbone "
            f"({type(network.backbone).__name__}) returns has no gradient in them: its forward runs under no_grad, "
            "detaches, or checkpoints with use_reentrant=True (write use_reentrant=False)."
        )


def restored(
    stored: StoredModel, backbone: Any, network: nn.Module | None, device: torch.device, *, source: str
) -> tuple[Extractor | None, nn.Module]:
    """Returns the backbone of a stored model on a device, and its network with weights still to be put into it.

    Args:
        stored: The model.
        backbone: That of the caller, as of ``Extractor.restore``; of a fine-tuned one the structure is all that counts.
        network: That of the caller, if the model does not say which it is.
        device: Where to compute.
        source: Name of the folder, for messages.

    Raises:
        TypeError, ValueError: As of ``Extractor.restore``, ``restore_inputs`` and ``StoredModel.build_network``.
    """
    backbone = named_backbone(backbone) if isinstance(backbone, str) else backbone
    if stored.backbone is None or "fine_tune" not in stored.backbone:
        extractor = Extractor.restore(stored.backbone, backbone, device, source=source)
        return extractor, stored.build_network() if network is None else network
    assert stored.preprocessing is not None
    inputs = restore_inputs(stored.backbone, backbone, device)
    likelihood = find_likelihood(stored.settings.likelihood)
    scale = torch.zeros_like(stored.tensors["buffer/feature_mean"])
    return inputs, _network(inputs, likelihood.num_outputs(stored.preprocessing.num_outputs), scale, scale)


def _network(inputs: FineTunedInputs, num_outputs: int, mean: Tensor, inverse_scale: Tensor) -> FineTuned:
    assert inputs.form is not None
    return FineTuned(
        inputs.module,
        learned=inputs.learned,
        form=inputs.form,
        num_outputs=num_outputs,
        mean=mean,
        inverse_scale=inverse_scale,
        has_root=inputs.square_root,
    )
