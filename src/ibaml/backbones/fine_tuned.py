"""A backbone that is learned in part: its parameters of some names are shared by all tasks, beside a head for each."""

import copy
import difflib
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ibaml.backbones.backbone import Backbone
from ibaml.backbones.extractor import Extraction, Extractor, Progress
from ibaml.backbones.inputs import Inputs, call_with, num_inputs_of
from ibaml.backbones.outputs import read_features
from ibaml.data.augmentation import UNCHANGED, Augmentation, NormalisedAugmentation
from ibaml.types import Tensor

_LARGEST_INDEX = 2**24
"""Up to here float32 holds every whole number."""


class InputForm(NamedTuple):
    """What the inputs of a backbone are, all of which travel as one tensor of floating-point numbers.

    Attributes:
        names: Of several inputs; empty for a single one.
        are_indices: For each, or for the single one, whether it holds whole numbers, such as token ids.
        shapes: Of one of each of several inputs, if these differ: they travel as one row of numbers.
    """

    names: tuple[str, ...]
    are_indices: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    def pack(self, named: Mapping[str, Tensor]) -> Tensor:
        """Returns inputs as one tensor, the reverse of ``unpack``.

        Args:
            named: The inputs; a single one has the name ``""``.
        """
        values = [named[name].float() for name in self.names or ("",)]
        if not self.names:
            return values[0]
        return torch.cat([v.reshape(len(v), -1) for v in values], 1) if self.shapes else torch.stack(values, 1)

    def unpack(self, x: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Returns the inputs as the module takes them.

        Args:
            x: ``[num_inputs, *shape]``, or ``[num_inputs, num_names, *shape]`` of several, of different shapes
                ``[num_inputs, num_numbers]``.
            dtype: Of inputs that hold no indices.
        """
        if not self.names:
            return x.long() if self.are_indices[0] else x.to(dtype)
        parts: Sequence[Tensor] = x.unbind(1)
        if self.shapes:
            rows = x.split([math.prod(shape) for shape in self.shapes], 1)
            parts = [row.reshape(-1, *shape) for row, shape in zip(rows, self.shapes, strict=True)]
        return {
            name: part.long() if is_index else part.to(dtype)
            for name, part, is_index in zip(self.names, parts, self.are_indices, strict=True)
        }


class FineTuned(nn.Module):
    """A backbone and a linear layer on its scaled features.

    Dropout does nothing and running statistics stay as they are: they belong to the data of the first training.

    Attributes:
        backbone: A copy of the module, whose parameters may be learned.
        head: The linear layer, whose place a head takes.

    Args:
        module: The module; not changed.
        learned: Names of its parameters that may be learned; others are frozen.
        form: Of its inputs.
        num_outputs: Outputs of the linear layer.
        mean: Subtracted from features, ``[num_features]``.
        inverse_scale: Features are multiplied by it, ``[num_features]``; 0 ignores one.
        has_root: Whether features are first scaled to length one and the square root is taken.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        learned: Collection[str],
        form: InputForm,
        num_outputs: int,
        mean: Tensor,
        inverse_scale: Tensor,
        has_root: bool,
    ) -> None:
        super().__init__()
        self.backbone = _with_fixed_statistics(copy.deepcopy(module))
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in learned)
        self.head = nn.Linear(len(mean), num_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.num_outputs = num_outputs
        self._form, self._has_root = form, has_root
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self.register_buffer("feature_mean", mean.float().clone())
        self.register_buffer("feature_inverse_scale", inverse_scale.float().clone())

    @property
    def learned(self) -> frozenset[str]:
        """Names of the backbone's parameters in this network that may be learned."""
        named = self.backbone.named_parameters(prefix="backbone")
        return frozenset(name for name, parameter in named if parameter.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs, ``[num_inputs, num_outputs]``.

        Args:
            x: Inputs, packed into one tensor; see ``InputForm``.
        """
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees, ``[num_inputs, num_features]``; ``x`` is as of ``forward``."""
        given = self._form.unpack(x, self._dtype)
        if isinstance(given, dict):
            features = read_features(call_with(self.backbone, given), x.shape[0], given.get("attention_mask"))
        else:
            features = read_features(self.backbone(given), x.shape[0])
        if self._has_root:
            features = root_of_features(features)
        mean, inverse = cast("Tensor", self.feature_mean), cast("Tensor", self.feature_inverse_scale)
        return (features - mean) * inverse


class FineTunedInputs(Extractor):
    """Stands where an extractor does, and gives inputs in the place of features: these are those of the network.

    Args:
        extractor: The backbone on a device.
        patterns: Of the names of parameters that are learned.
        form: Of the inputs. None: that of the first that come.

    Raises:
        ValueError: If the backbone is a function, or a pattern matches none of its parameters.
    """

    def __init__(self, extractor: Extractor, patterns: Sequence[str], form: InputForm | None = None) -> None:
        super().__init__(extractor.backbone, extractor.device)
        self.square_root, self.column, self.positions = extractor.square_root, extractor.column, extractor.positions
        self.patterns = tuple(patterns)
        self.form = form
        self.learned = match_parameters(extractor.backbone, patterns)

    @property
    def module(self) -> nn.Module:
        """The backbone's module, with the weights from before."""
        return cast("nn.Module", self.backbone.module)

    def settings(self) -> dict[str, Any]:
        """Returns what describes the backbone and its inputs, as JSON values."""
        assert self.form is not None
        form: dict[str, Any] = {"names": list(self.form.names), "are_indices": list(self.form.are_indices)}
        if self.form.shapes:
            form["shapes"] = [list(shape) for shape in self.form.shapes]
        return {**super().settings(), "fine_tune": list(self.patterns), "form": form}

    def augmentation(self, of_images: Augmentation) -> Augmentation:
        """Returns the changes as they are of the images that the module gets, which may be normalised."""
        backbone = self.backbone
        if of_images == UNCHANGED or backbone.mean is None or backbone.std is None:
            return of_images
        return NormalisedAugmentation(**vars(of_images), mean=tuple(backbone.mean), std=tuple(backbone.std))

    def choose_root(self, features: Sequence[Any]) -> list[Any]:
        """Returns what it is given: inputs have no roots."""
        return list(features)

    def features(self, argument: str, x: Any) -> Any:
        """Returns inputs as one array of floating-point numbers, ``[num_inputs, *shape]``.

        Args:
            argument: How messages call the inputs.
            x: As of ``Extractor.features``.

        Raises:
            TypeError: If inputs are text.
            ValueError: If they differ in form from those before.
        """
        return self._packed(argument, self.read(argument, x)).numpy()

    def features_of_tasks(self, tasks: Sequence[tuple[str, Any]], *, on_progress: Progress | None = None) -> Extraction:
        """Returns the inputs of several tasks; see ``features``."""
        found = [self.features(argument, x) for argument, x in tasks]
        num_inputs = sum(map(len, found))
        if on_progress is not None:
            on_progress(num_inputs, num_inputs)
        return Extraction(found, num_inputs, 0, None)

    def _packed(self, argument: str, inputs: Inputs) -> Tensor:
        if isinstance(inputs, list):
            raise TypeError(
                f"{argument} holds text, but fine_tune trains the module that comes after the tokenizer: give what the "
                "tokenizer returns, such as {'input_ids': ..., 'attention_mask': ...}, all padded to one length."
            )
        named = inputs if isinstance(inputs, dict) else {"": self.backbone.prepare(argument, inputs)}
        are_indices = tuple(not value.is_floating_point() for value in named.values())
        shapes = tuple(tuple(value.shape[1:]) for value in named.values())
        form = InputForm(tuple(name for name in named if name), are_indices, shapes if len(set(shapes)) > 1 else ())
        if self.form is None:
            self.form = form
        elif _as_set(form) != _as_set(self.form):
            raise ValueError(f"{argument} has inputs of the form {form}, but training had {self.form}: give the same.")
        for value in named.values():
            if not value.is_floating_point() and num_inputs_of(value) and int(value.abs().max()) > _LARGEST_INDEX:
                raise ValueError(f"{argument} has indices above {_LARGEST_INDEX:,}, which fine_tune does not take.")
        return self.form.pack({name: value.cpu() for name, value in named.items()})


def restore_inputs(stored: Mapping[str, Any], backbone: Any, device: torch.device) -> FineTunedInputs:
    """Builds what ``FineTunedInputs.settings`` described, of a module of the same structure with any weights.

    Args:
        stored: The settings.
        backbone: The module, or a ``Backbone`` of it.
        device: Where to compute.

    Raises:
        ValueError: If there is no module, or it has no parameters of the names that are learned.
    """
    if backbone is None:
        raise ValueError(
            "the model has a fine-tuned backbone, whose structure is not stored: pass a module like it, with any "
            "weights, MetaLearner.load(folder, backbone=...)."
        )
    settings: dict[str, Any] = {
        name: stored[name] for name in ("image_size", "channels", "mean", "std", "name", "square_root")
    }
    for name in ("image_size", "mean", "std"):
        settings[name] = None if settings[name] is None else tuple(settings[name])
    if not isinstance(backbone, Backbone):
        backbone = Backbone(module=backbone, **settings)
    extractor = Extractor(backbone, device)
    extractor.square_root = bool(stored["square_root"])
    extractor.column, extractor.positions = stored["column"], stored.get("positions", 0)
    shapes = tuple(tuple(shape) for shape in stored["form"].get("shapes", ()))
    form = InputForm(tuple(stored["form"]["names"]), tuple(stored["form"]["are_indices"]), shapes)
    return FineTunedInputs(extractor, stored["fine_tune"], form)


def match_parameters(backbone: Backbone, patterns: Sequence[str]) -> frozenset[str]:
    """Returns the names of a backbone's parameters that match any of some patterns.

    Raises:
        ValueError: If the backbone is a function, or a pattern matches nothing.
    """
    module = backbone.module
    if not isinstance(module, nn.Module):
        raise ValueError(
            "fine_tune names parameters of an nn.Module, but the backbone is a function, only the features of which "
            "are seen: give the module, or leave fine_tune out to use its features as they are."
        )
    names = [name for name, value in module.named_parameters() if value.is_floating_point()]
    learned: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else " It has no parameters."
            raise ValueError(f"fine_tune pattern {pattern!r} matches none of the backbone's parameters.{hint}")
        learned.update(found)
    return frozenset(learned)


def root_of_features(features: Tensor) -> Tensor:
    """Returns features of length one with the square root of each, its sign kept, with a derivative at zero.

    Args:
        features: ``[num_inputs, num_features]``.
    """
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit = features / torch.where(length > 0, length, 1.0)
    size = unit.abs()
    is_positive = size > 0
    return torch.sign(unit) * torch.where(is_positive, torch.where(is_positive, size, 1.0).sqrt(), 0.0)


def _as_set(form: InputForm) -> set[Any]:
    names = form.names or ("",)
    return set(zip(names, form.are_indices, form.shapes or ((),) * len(names), strict=True))


def _with_fixed_statistics(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part.training = False
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:  # pyright: ignore[reportPrivateUsage]
            # In evaluation mode it then normalises by its buffers, as before, and nothing takes them for learned ones.
            part.track_running_stats = False
    return module
