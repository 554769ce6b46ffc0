"""Programs for the passes through a network that training consists of: written down once, replayed ever after."""

from ibaml.traced.loss import TracedNll, channels_last, flatten, is_convolutional, is_small, unflatten
from ibaml.traced.program import UntraceableError

__all__ = ["TracedNll", "UntraceableError", "channels_last", "flatten", "is_convolutional", "is_small", "unflatten"]
