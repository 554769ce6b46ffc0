"""Packages that only some uses need."""

import importlib
from typing import Any


def require(module: str, package: str, extra: str) -> Any:
    """Imports a module of an optional extra.

    Args:
        module: Module to import.
        package: Name of the package that has it, for the message.
        extra: The extra of ``ibaml`` that installs it.

    Raises:
        ImportError: If it is not installed, saying how to install it.

    Examples:
        >>> require("math", "python", "experiments").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}, which is not installed: pip install 'ibaml[{extra}]'.") from error
