"""Backbones by name: of a publisher of pretrained networks, or an object of a Python module."""

import difflib
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ibaml.backbones.backbone import Backbone
from ibaml.optional import require
from ibaml.types import Tensor

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def named_backbone(name: str, *, pretrained: bool = True) -> Backbone:
    """Returns a pretrained network as a backbone, with the size and scale of images that its publisher says.

    | name | what |
    |---|---|
    | ``timm:MODEL`` | any model of ``timm.list_models()`` without its classifier |
    | ``torchvision:MODEL`` | any of ``torchvision.models.list_models()`` without its last linear layer |
    | ``sentence-transformers:MODEL`` | an encoder of sentences, by name on its hub or by folder |
    | ``transformers:MODEL`` | a text encoder, likewise; the mean of its last hidden states |

    Each needs the extra of its publisher's name. Weights are downloaded by these packages into their own caches, under
    the licences of who trained them.

    Args:
        name: Such as ``"timm:resnet50"``.
        pretrained: False: random weights of the same architecture (not of the last two, whose folders say it).

    Raises:
        ImportError: If the package is not installed.
        ValueError: If there is no such publisher or model.
        OSError: If the weights cannot be had.
    """
    publisher, _, model = name.partition(":")
    if publisher not in _PUBLISHERS or not model:
        raise ValueError(
            f"backbone is {name!r}; expected publisher:model with one of {', '.join(_PUBLISHERS)}, such as "
            "timm:resnet50, or an nn.Module, callable or Backbone."
        )
    return _PUBLISHERS[publisher](name, model, pretrained)


def as_backbone(backbone: Any) -> Backbone:
    """Returns a backbone as a record; a module or callable gets the default settings, a name what it stands for.

    Raises:
        TypeError: If it is none of these.
        ImportError, ValueError, OSError: As of ``named_backbone``.
    """
    if isinstance(backbone, str):
        return named_backbone(backbone)
    return backbone if isinstance(backbone, Backbone) else Backbone(module=backbone)


def import_backbone(path: str) -> Any:
    """Returns what ``named_backbone`` does, or the object ``module:name`` of a module or a file of the current folder.

    The latter runs the code of the module, as an import does.

    Args:
        path: Such as ``"timm:resnet50"``, or ``"my_backbones:resnet"``, an ``nn.Module``, callable or ``Backbone`` in
            ``my_backbones.py``.

    Raises:
        ImportError, OSError: As of ``named_backbone``.
        ValueError: Likewise, or if the path is no such name, or there is no such module or object.

    Examples:
        >>> import_backbone("torch.nn:Identity")
        <class 'torch.nn.modules.linear.Identity'>
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"backbone is {path!r}; expected module:name, such as my_backbones:resnet for my_backbones.py."
        )
    if module_name in _PUBLISHERS:
        return named_backbone(path)
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        return functools.reduce(getattr, name.split("."), module)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone is {path!r}, which cannot be imported from {folder}: {error}.") from error
    finally:
        sys.path.remove(folder)


class TextEncoder(nn.Module):
    """An encoder of ``transformers`` with its tokenizer, as a function of text.

    Args:
        tokenizer: Returns ``input_ids`` and ``attention_mask`` of texts.
        encoder: Returns a ``last_hidden_state``.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.encoder = encoder
        vocabulary = sorted(tokenizer.get_vocab().items())
        self._vocabulary = hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]

    def extra_repr(self) -> str:
        """Returns what tells this tokenizer from others, so that features of another one are others."""
        return f"vocabulary={self._vocabulary}"

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns the mean of the last hidden states over the tokens of each text, ``[num_texts, num_features]``."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(next(self.encoder.parameters()).device)
        hidden = self.encoder(**tokens).last_hidden_state
        weight = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _of_timm(name: str, model: str, pretrained: bool) -> Backbone:
    timm: Any = require("timm", "timm", "timm")
    _require_known(name, model.partition(".")[0], timm.list_models())
    module = _weights_of(name, lambda: timm.create_model(model, pretrained=pretrained, num_classes=0))
    how = timm.data.resolve_model_data_config(module)
    _, height, width = how["input_size"]
    return Backbone(module=module, image_size=(height, width), mean=how["mean"], std=how["std"], name=name)


def _of_torchvision(name: str, model: str, pretrained: bool) -> Backbone:
    models: Any = require("torchvision.models", "torchvision", "torchvision")
    _require_known(name, model, models.list_models(module=models))
    weights = models.get_model_weights(model).DEFAULT
    module = _weights_of(name, lambda: models.get_model(model, weights=weights if pretrained else None))
    linear = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{name} has no linear layer at its end that could be taken off: give a module that returns its features."
        )
    parent, _, child = linear[-1].rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    how = weights.transforms()
    mean, std = (tuple(getattr(how, key, usual)) for key, usual in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)))
    return Backbone(module=module, image_size=how.crop_size[0], mean=mean, std=std, name=name)


def _of_sentence_transformers(name: str, model: str, pretrained: bool) -> Backbone:
    _require_pretrained(name, pretrained)
    package: Any = require("sentence_transformers", "sentence-transformers", "sentence-transformers")
    encoder = _weights_of(name, lambda: package.SentenceTransformer(model, device="cpu"))
    return Backbone(module=encoder.encode, name=name)


def _of_transformers(name: str, model: str, pretrained: bool) -> Backbone:
    _require_pretrained(name, pretrained)
    package: Any = require("transformers", "transformers", "transformers")
    tokenizer = _weights_of(name, lambda: package.AutoTokenizer.from_pretrained(model))
    encoder = _weights_of(name, lambda: package.AutoModel.from_pretrained(model))
    return Backbone(module=TextEncoder(tokenizer, encoder), name=name)


_PUBLISHERS: Mapping[str, Callable[[str, str, bool], Backbone]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "sentence-transformers": _of_sentence_transformers,
    "transformers": _of_transformers,
}


def _weights_of(name: str, load: Callable[[], Any]) -> Any:
    """Returns a model.

    Raises:
        OSError: If its weights cannot be had.
    """
    try:
        return load()
    except Exception as error:  # each package, and each client of a network below it, has errors of its own
        raise OSError(
            f"the weights of {name} cannot be had ({type(error).__name__}: {error}): connect to the network once, or "
            "load them yourself and give the module, MetaLearner(backbone=module)."
        ) from error


def _require_known(name: str, model: str, known: Sequence[str]) -> None:
    if model not in known:
        nearest = difflib.get_close_matches(model, known, n=3, cutoff=0.0)
        raise ValueError(f"backbone is {name!r}, and there is no such model; near are {', '.join(nearest)}.")


def _require_pretrained(name: str, pretrained: bool) -> None:
    if not pretrained:
        raise ValueError(f"pretrained=False does not go with {name}: give the folder of a model with random weights.")
