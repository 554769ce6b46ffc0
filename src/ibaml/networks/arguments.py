"""Checks of arguments that several networks share."""

from collections.abc import Sequence

from ibaml.types import Tensor


def check_positive(name: str, value: int) -> None:
    """Refuses a count that is not an integer of at least one.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Raises:
        TypeError: If ``value`` is not an int.
        ValueError: If ``value`` is below one.
    """
    if not isinstance(value, int) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def image_shape(in_channels: int, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """Returns the shape of one image, ``(in_channels, height, width)``.

    Args:
        in_channels: Number of channels.
        image_size: Side of a square image, or ``(height, width)``.

    Returns:
        The shape.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, or ``image_size`` has other than two entries.

    Examples:
        >>> image_shape(3, 84)
        (3, 84, 84)
    """
    check_positive("in_channels", in_channels)
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be one side or (height, width), got {image_size!r}.")
    for side in sides:
        check_positive("image_size", side)
    return in_channels, *sides


def check_input(x: Tensor, input_shape: Sequence[int], *, min_examples: int = 1) -> None:
    """Refuses a batch whose examples have another shape than the network was built for.

    Only shapes are looked at, so the check also works under ``torch.func.vmap``.

    Args:
        x: Batch of inputs, expected shape ``[examples, *input_shape]``.
        input_shape: Shape of one example.
        min_examples: Smallest number of examples; 2 where batch statistics would otherwise be taken over one value.

    Raises:
        ValueError: Naming the expected shape and the one that came.
    """
    if x.ndim != 1 + len(input_shape) or tuple(x.shape[1:]) != tuple(input_shape):
        expected = ", ".join(["examples", *map(str, input_shape)])
        raise ValueError(
            f"x must have shape [{expected}], got {list(x.shape)}; "
            "build the network for these inputs, or reshape or resize them."
        )
    if x.shape[0] < min_examples:
        raise ValueError(
            f"x has {x.shape[0]} example(s), but norm='batch' needs at least {min_examples} here "
            "to estimate a variance; use norm='group' or norm='none', or pass more examples at a time."
        )
