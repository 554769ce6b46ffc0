"""Packages that only the comparisons with other methods need."""

import importlib
from typing import Any


def require(module: str, package: str) -> Any:
    """Imports a module of the optional extra ``experiments``.

    Args:
        module: Module to import.
        package: Name of the package that has it, for the message.

    Raises:
        ImportError: If it is not installed, saying how to install it.

    Examples:
        >>> require("math", "python").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this experiment compares with methods of other packages and needs {package}, which is not installed: "
            "pip install 'ibaml[experiments]'."
        ) from error
