"""Devices by name."""

import torch


def resolve_device(name: str | torch.device) -> torch.device:
    """Returns the device of a name, or a device itself; ``"auto"`` is CUDA if present.

    Raises:
        ValueError: If it is no device of this kind, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, but is {name!r}.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device is {str(name)!r}, but this torch finds {count or 'no'} CUDA device(s): use cpu.")
    return device
