"""Backbones that a command line can name: an object of a Python module."""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any


def import_backbone(path: str) -> Any:
    """Returns the object ``module:name``, where the module is installed or a file of the current folder.

    It runs the code of the module, as an import does.

    Args:
        path: Such as ``"my_backbones:resnet"``, an ``nn.Module``, callable or ``Backbone`` in ``my_backbones.py``.

    Raises:
        ValueError: If the path is no such name, or there is no such module or object.

    Examples:
        >>> import_backbone("torch.nn:Identity")
        <class 'torch.nn.modules.linear.Identity'>
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"backbone is {path!r}; expected module:name, such as my_backbones:resnet for my_backbones.py."
        )
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        return functools.reduce(getattr, name.split("."), module)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone is {path!r}, which cannot be imported from {folder}: {error}.") from error
    finally:
        sys.path.remove(folder)
