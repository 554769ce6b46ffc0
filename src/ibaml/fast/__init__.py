"""The same numbers sooner: flat parameters, programs for passes through a network, CUDA graphs, kept memory.

Nothing below knows this package; algorithms get an ``ibaml.algorithms.nll.Nll`` that is made here.
"""

from ibaml.fast.allocator import keep_freed_memory
from ibaml.fast.cuda_graph import DeviceLostError, is_device_lost, replayed
from ibaml.fast.flat import flatten, unflatten
from ibaml.fast.nll import FlatNll, ProgramNll, channels_last
from ibaml.fast.parts import NllInParts
from ibaml.fast.programs import UntraceableError

__all__ = [
    "DeviceLostError",
    "FlatNll",
    "NllInParts",
    "ProgramNll",
    "UntraceableError",
    "channels_last",
    "flatten",
    "is_device_lost",
    "keep_freed_memory",
    "replayed",
    "unflatten",
]
