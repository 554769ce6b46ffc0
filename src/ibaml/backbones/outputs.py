"""What a backbone returns, in the forms that libraries use, as one vector of features for each input."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from ibaml.types import Tensor

_NAMES = ("pooler_output", "last_hidden_state")
"""Names under which encoders return features, the first that is there is taken."""

_WRAP = "wrap the backbone in a module or function that returns features [num_inputs, num_features]"


def as_features(outputs: Any, num_inputs: int, mask: Tensor | None = None) -> Tensor:
    """Returns the features in what a backbone returned.

    | outputs | features |
    |---|---|
    | ``[n, num_features]`` (tensor, array, list of vectors) | as they are |
    | ``[n, channels, height, width]`` or with more axes | mean over all axes from the third on |
    | ``[n, length, num_features]`` | mean over the length, of the places where the mask is not 0 |
    | tuple or list of tensors, such as that of a recurrent layer | its first member, read likewise |
    | mapping or dataclass | its ``pooler_output`` or ``last_hidden_state``, or its only member, read likewise |

    Args:
        outputs: What came.
        num_inputs: Number of inputs of the batch, ``n``.
        mask: ``[n, length]``, 0 where a sequence is padded; None: nowhere.

    Returns:
        float32 on the CPU, ``[n, num_features]``.

    Raises:
        TypeError: If there are no numbers in the outputs.
        ValueError: If their shape is none of the above, or no member of a mapping has a known name.

    Examples:
        >>> as_features((torch.ones(2, 5, 3), None), 2).shape
        torch.Size([2, 3])
    """
    return read_features(outputs, num_inputs, mask).detach().cpu()


def read_features(outputs: Any, num_inputs: int, mask: Tensor | None = None) -> Tensor:
    """Returns what ``as_features`` does, where it was computed and differentiable; arguments and errors likewise."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type | Mapping):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        return read_features(_member(cast("Mapping[str, Any]", outputs)), num_inputs, mask)
    if isinstance(outputs, tuple | list) and _holds_tensors(members := cast("Sequence[Any]", outputs)):
        # A list of one vector for each input, as sentence encoders give, is no tuple of outputs.
        is_list_of_vectors = isinstance(outputs, list) and len(members) == num_inputs and members[0].ndim == 1
        return read_features(torch.stack(list(members)) if is_list_of_vectors else members[0], num_inputs, mask)
    values: Tensor = outputs if isinstance(outputs, torch.Tensor) else _as_tensor(outputs)
    if values.is_complex():
        raise TypeError(f"the backbone returns values of dtype {values.dtype}, but features are real: {_WRAP}.")
    if values.ndim < 2 or values.shape[0] != num_inputs or 0 in values.shape[1:]:
        raise ValueError(
            f"the backbone returns shape {tuple(values.shape)} for {num_inputs} inputs, but expected [num_inputs, "
            f"num_features], maps [num_inputs, channels, height, width] or sequences [num_inputs, length, "
            f"num_features] (recurrent layers: batch_first=True): {_WRAP}."
        )
    values = values.float()
    if values.ndim == 3:
        return _mean_of_sequence(values, mask)
    return values if values.ndim == 2 else values.flatten(2).mean(2)


def _holds_tensors(members: Sequence[Any]) -> bool:
    return len(members) > 0 and isinstance(members[0], torch.Tensor)


def _member(outputs: Mapping[str, Any]) -> Any:
    present = {name: value for name, value in outputs.items() if value is not None}
    for name in _NAMES:
        if name in present:
            return present[name]
    if len(present) == 1:
        return next(iter(present.values()))
    raise ValueError(
        f"the backbone returns a mapping or dataclass with {', '.join(present) or 'nothing'}; expected "
        f"{' or '.join(_NAMES)}, or a single member: {_WRAP}."
    )


def _as_tensor(outputs: Any) -> Tensor:
    try:
        values = np.asarray(outputs)
    except ValueError as error:
        raise ValueError(f"the backbone returns vectors of different lengths ({error}): {_WRAP}.") from error
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"the backbone returns {type(outputs).__name__} of dtype {values.dtype}, which holds no numbers: {_WRAP}."
        )
    return torch.from_numpy(np.array(values))


def _mean_of_sequence(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape[:2]:
        return values.mean(1)
    weight = (mask != 0).to(values).unsqueeze(-1)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)
