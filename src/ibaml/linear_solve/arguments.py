"""Checks of the arguments that all linear solvers share."""


def check(max_steps: int, rtol: float) -> None:
    """Refuses a step limit below one and a tolerance outside ``[0, 1)``.

    Raises:
        ValueError: Naming the argument and what came.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, but is {max_steps}.")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is relative to the norm of the right-hand side: expected 0 <= rtol < 1, got {rtol}.")
