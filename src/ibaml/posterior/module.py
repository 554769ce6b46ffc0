"""An adapted task as a plain module: what a program needs that predicts and learns nothing."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import Algorithm, GradientBased, Head
from ibaml.algorithms.model import Model
from ibaml.backbones import Backbone, Extractor, FineTunedInputs, read_features
from ibaml.backbones.fine_tuned import root_of_features
from ibaml.backbones.inputs import by_position, call_with
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.standardizer import Standardizer
from ibaml.likelihoods import ClassPrediction, MixturePrediction
from ibaml.networks import RadialBasis
from ibaml.posterior.fitted import predicted
from ibaml.seeds import noise_generator
from ibaml.types import Params, Tensor

if TYPE_CHECKING:
    from ibaml.posterior.fitted import FittedModel


class TaskModule(nn.Module):
    """Predictions of one task: all that adaptation found is in its buffers, and nothing is sampled.

    A call with inputs in the units of the data gives for classes their probabilities, ``[num_examples, num_classes]``,
    and for numbers mean and variance in the units of the targets, each in the shape of the training targets. Both are
    differentiable in inputs of floating-point numbers. Inputs are not checked.

    Attributes:
        backbone: What makes features of inputs; None if there is none.
        body: What comes before the head; None where weights of the whole network are adapted.
        networks: Networks with adapted weights, where the task has no head; one for each sample of them.
    """

    def __init__(
        self,
        *,
        scales: nn.Module,
        backbone: nn.Module | None,
        body: nn.Module | None,
        networks: Sequence[nn.Module],
        posterior: Any,
        algorithm: Algorithm,
        likelihood: Any,
        shared: Params,
        temperature: float,
        is_vector: bool,
    ) -> None:
        super().__init__()
        self.scales, self.backbone, self.body = scales, backbone, body
        self.networks = nn.ModuleList(networks)
        self._algorithm, self._likelihood = algorithm, likelihood
        self._temperature, self._is_vector = temperature, is_vector
        leaves, self._rebuild = tree.flatten(posterior)
        self._num_leaves, self._shared_names = len(leaves), tuple(shared)
        for index, value in enumerate((*leaves, *shared.values())):
            self.register_buffer(f"posterior_{index}", value.detach().clone())
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Returns probabilities, or mean and variance.

        Args:
            x: Inputs, ``[num_examples, *input_shape]``; of a backbone with several a tuple of them, or a dict by name.
        """
        encoded = self.scales(x if self.backbone is None else self.backbone(x))
        values = [getattr(self, f"posterior_{i}") for i in range(self._num_leaves + len(self._shared_names))]
        shared = dict(zip(self._shared_names, values[self._num_leaves :], strict=True))
        if self.body is None:
            outputs = {"outputs": torch.stack([network(encoded) for network in self.networks])}
        else:
            posterior = self._rebuild(values[: self._num_leaves])
            outputs = self._algorithm.outputs(_Body(self.body), shared, posterior, encoded, {})
        prediction = predicted(self._likelihood, shared, outputs, self._temperature)
        if isinstance(prediction, ClassPrediction):
            return prediction.probs
        prediction = cast("Scales", self.scales).in_units(cast("MixturePrediction", prediction))
        found = dataclasses.replace(prediction, is_vector=self._is_vector)
        return found.mean, found.total_uncertainty


class Scales(nn.Module):
    """Scales of inputs and targets as fitted on training tasks; without any, inputs and targets stay as they are.

    Args:
        preprocessing: The scales; None if there are none.
        dtype: Of the inputs of the network.
    """

    def __init__(self, preprocessing: Preprocessing | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._has_inputs = preprocessing is not None
        self._has_targets = preprocessing is not None and preprocessing.targets is not None
        if preprocessing is not None:
            self._add("input", preprocessing.inputs)
            if preprocessing.targets is not None:
                self._add("target", preprocessing.targets)

    def forward(self, x: Tensor) -> Tensor:
        """Returns scaled inputs in the type of the weights; indices stay as they are."""
        if not self._has_inputs:
            return x.to(self._dtype) if x.is_floating_point() else x
        # Of an ignored feature the inverse scale is 0, and a product with 0 is 0 for all finite values.
        mean, inverse = cast("Tensor", self.input_mean), cast("Tensor", self.input_inverse)
        return ((x.double() - mean) * inverse).to(self._dtype)

    def in_units(self, prediction: MixturePrediction) -> MixturePrediction:
        """Returns a prediction of numbers in the units of the targets."""
        if not self._has_targets:
            return prediction
        return prediction.rescaled(cast("Tensor", self.target_mean), 1 / cast("Tensor", self.target_inverse))

    def _add(self, name: str, scale: Standardizer) -> None:
        self.register_buffer(f"{name}_mean", scale.mean.clone())
        self.register_buffer(f"{name}_inverse", scale.inverse_scale.clone())


class BackboneFeatures(nn.Module):
    """A backbone's features of inputs, as its extractor gives them, differentiable in the inputs.

    Args:
        extractor: The backbone on a device. Its module is copied.

    Raises:
        ValueError: If the backbone is a function, which no module can hold.
    """

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        backbone = extractor.backbone
        if not isinstance(backbone.module, nn.Module):
            raise ValueError(
                "the backbone is a function, which a module cannot hold: give MetaLearner an nn.Module as backbone, or "
                "take to_module(of_features=True), whose inputs are the features that the function returns."
            )
        self.module = copy.deepcopy(backbone.module)
        self.pixels, self._has_root = Pixels(backbone), extractor.square_root
        weights = [p for p in self.module.parameters() if p.is_floating_point()]
        self._dtype = weights[0].dtype if weights else torch.float32

    def forward(self, x: Any) -> Tensor:
        """Returns features, ``[num_inputs, num_features]``.

        Args:
            x: Images ``[num_inputs, channels, height, width]`` in the size of the backbone, pixels of 0..255 as uint8
                or numbers in [0, 1]; other inputs as the backbone takes them, of several a tuple, or a dict by name.

        Raises:
            ValueError: If images have another size: they are not resized here.
        """
        named = {name: self._ready(value) for name, value in _named(x).items()}
        num_inputs = next(iter(named.values())).shape[0]
        features = read_features(call_with(self.module, named), num_inputs, named.get("attention_mask"))
        return root_of_features(features) if self._has_root else features

    def _ready(self, values: Tensor) -> Tensor:
        values = self.pixels(values)
        return values.to(self._dtype) if values.is_floating_point() else values


class PackedInputs(nn.Module):
    """The inputs of a backbone that is part of the network, as that takes them; see ``InputForm``.

    Args:
        inputs: The backbone, and the form of its inputs.
    """

    def __init__(self, inputs: FineTunedInputs) -> None:
        super().__init__()
        assert inputs.form is not None
        self.pixels, self._form = Pixels(inputs.backbone), inputs.form

    def forward(self, x: Any) -> Tensor:
        """Returns the inputs as one tensor; arguments and errors are those of ``BackboneFeatures``."""
        return self._form.pack(_named(x) if self._form.names else {"": self.pixels(x)})


def _named(x: Any) -> Mapping[str, Tensor]:
    if isinstance(x, Mapping):
        return cast("Mapping[str, Tensor]", x)
    return by_position(cast("tuple[Tensor, ...]", x) if isinstance(x, tuple) else (x,))


class Pixels(nn.Module):
    """Images as a backbone takes them, without resizing; all else unchanged.

    Args:
        backbone: Says what it takes.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._image_size, self._normalises = backbone.size, backbone.mean is not None
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            if values is not None:
                self.register_buffer(name, torch.tensor(list(values)).reshape(-1, 1, 1))

    def forward(self, values: Tensor) -> Tensor:
        """Returns pixels of 0..255 (uint8), or numbers in [0, 1], normalised.

        Args:
            values: ``[num_inputs, channels, height, width]``, or anything else.

        Raises:
            ValueError: If images have another size.
        """
        if values.ndim != 4 or not (values.dtype == torch.uint8 or values.is_floating_point()):
            return values
        if self._image_size is not None and tuple(values.shape[2:]) != self._image_size:
            raise ValueError(
                f"x has images of height and width {tuple(values.shape[2:])}, but the module takes "
                f"{self._image_size}: resize them first."
            )
        if values.dtype == torch.uint8:
            values = values.float() / 255
        if not self._normalises:
            return values
        return (values - cast("Tensor", self.mean)) / cast("Tensor", self.std)


def to_module(
    fitted: "FittedModel", posterior: Any, *, num_samples: int | None, seed: int, of_features: bool
) -> TaskModule:
    """Returns a posterior as a module; see ``TaskPosterior.to_module``.

    Args:
        fitted: The fitted model.
        posterior: What the algorithm's ``adapt`` returned.
        num_samples: Weight samples, for algorithms on weights. None: the mean of the weights.
        seed: Of the weight samples.
        of_features: Whether inputs are features of the backbone.

    Raises:
        ValueError: If the backbone is a function, there is none for ``of_features``, inputs are columns of categories
            or with gaps, or ``num_samples`` is given to an algorithm that samples no weights.
    """
    model, algorithm, preprocessing = fitted.model, fitted.algorithm, fitted.preprocessing
    _require_numbers(preprocessing)
    if of_features and isinstance(fitted.backbone, FineTunedInputs):
        raise ValueError("of_features=True, but of a fine-tuned backbone features are no inputs: leave it out.")
    if of_features and fitted.backbone is None:
        raise ValueError(
            "of_features=True, but the learner has no backbone, whose features they would be: leave it out."
        )
    own = {name: fitted.meta.shared[name] for name in model.likelihood.initial_parameters()}
    body, networks = None, list[nn.Module]()
    if isinstance(algorithm, Head):
        if num_samples is not None:
            raise ValueError(
                f"num_samples is {num_samples}, but algorithm {algorithm.name!r} predicts from its posterior without "
                "weight samples: leave it out."
            )
        assert model.tail is not None
        body = _with_values(model.tail.body, {**model.frozen, **_of_network(model, fitted.meta.shared)})
        head = algorithm.for_task(model)
        assert isinstance(head, Head)
        algorithm, posterior = head, posterior._replace(solution=head.in_products(posterior.solution))
    else:
        assert isinstance(algorithm, GradientBased)
        weights = _weights(algorithm, fitted, posterior, num_samples, seed)
        common = {**model.frozen, **_of_network(model, fitted.meta.shared)}
        networks = [_with_values(model.network, {**common, **each}) for each in weights]
        posterior = ()
    return TaskModule(
        scales=Scales(preprocessing, fitted.dtype),
        backbone=None if of_features else _inputs_of(fitted.backbone),
        body=body,
        networks=networks,
        posterior=posterior,
        algorithm=algorithm,
        likelihood=model.likelihood,
        shared=own,
        temperature=fitted.temperature,
        is_vector=preprocessing is not None and preprocessing.is_vector,
    ).to(fitted.device)


class _Body:
    """The features of a network whose last layer is a head, for ``Algorithm.outputs``."""

    def __init__(self, body: nn.Module) -> None:
        self._body = body

    def features(self, shared: Params, x: Tensor) -> Tensor:
        del shared
        return self._body(x)

    def outputs(self, adapted: Params, shared: Params, x: Tensor) -> Tensor:
        raise NotImplementedError("a head computes its outputs from features")


def _inputs_of(extractor: Extractor | None) -> nn.Module | None:
    if isinstance(extractor, FineTunedInputs):
        return PackedInputs(extractor)
    return None if extractor is None else BackboneFeatures(extractor)


def _require_numbers(preprocessing: Preprocessing | None) -> None:
    if preprocessing is None:
        return
    others = [column.name for column in preprocessing.columns or () if not column.is_plain]
    if others or preprocessing.formula is not None:
        what = f"column {others[0]!r} holds categories or gaps" if others else "the model has a formula"
        raise ValueError(
            f"{what}, but the inputs of a module are numbers: fit on columns of numbers without gaps, features=[...]."
        )


def _of_network(model: Model, shared: Params) -> Params:
    return {name: shared[name] for name in model.shared_names}


def _weights(
    algorithm: GradientBased, fitted: "FittedModel", posterior: Any, num_samples: int | None, seed: int
) -> list[Params]:
    if num_samples is None:
        return [algorithm.mean_weights(posterior)]
    if not algorithm.is_bayesian:
        raise ValueError(
            f"num_samples is {num_samples}, but algorithm {algorithm.name!r} has one set of weights and no posterior: "
            "leave it out."
        )
    sampling = dataclasses.replace(cast("Any", algorithm), num_evaluation_samples=num_samples)
    noise = sampling.draw_evaluation_noise(fitted.meta, generator=noise_generator("prediction", seed))
    return sampling.weight_samples(posterior, tree.map(lambda leaf: leaf.to(fitted.device), noise))


def _with_values(module: nn.Module, values: Params) -> nn.Module:
    """Returns a copy of a module with some parameters and buffers of other values."""
    own = copy.deepcopy(module)
    with torch.no_grad():
        for name, tensor in (*own.named_parameters(), *own.named_buffers()):
            if name in values:
                tensor.copy_(values[name])
    for part in own.modules():
        if isinstance(part, RadialBasis):
            part.fix_features()
    return own
