"""The conventions of scikit-learn's estimators, so that ``sklearn.base.clone`` and searches over settings work."""

import inspect
from typing import Any, Self

from torch import nn

from ibaml.optional import require


class NotFittedError(RuntimeError, ValueError, AttributeError):
    """The learner has not been fitted; it is caught as RuntimeError, ValueError and AttributeError alike."""


class Estimator:
    """Keeps the constructor's arguments as they were given.

    Args:
        **parameters: The arguments of the subclass's constructor by name.
    """

    def __init__(self, **parameters: Any) -> None:
        self._parameters: dict[str, Any] = parameters

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the constructor's arguments as they were given.

        Args:
            deep: Not used; there are no nested learners.
        """
        del deep
        return dict(self._parameters)

    def set_params(self, **parameters: Any) -> Self:
        """Changes constructor arguments and forgets what was fitted.

        Raises:
            ValueError: If there is no such argument, or its value is refused.
        """
        if unknown := sorted(set(parameters) - set(self._parameters)):
            raise ValueError(
                f"{type(self).__name__} has no parameter {', '.join(unknown)}; there are {', '.join(self._parameters)}."
            )
        type(self).__init__(self, **{**self._parameters, **parameters})
        return self

    def __sklearn_tags__(self) -> Any:
        """Tells scikit-learn what to expect, for its cross-validation: tasks without a target of their own.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        utils = require("sklearn.utils", "scikit-learn", "experiments")
        return utils.Tags(
            estimator_type=None, target_tags=utils.TargetTags(required=False), input_tags=utils.InputTags()
        )

    def __repr__(self) -> str:
        """Shows the arguments that are not the default ones; of a network or a record the kind."""
        defaults = inspect.signature(type(self).__init__).parameters
        changed = {name: value for name, value in self._parameters.items() if value != defaults[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in changed.items())})"


def _short(value: Any) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, nn.Module) or hasattr(value, "describe") else repr(value)
