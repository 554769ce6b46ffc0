"""Bad arguments are named, with what came and what to do."""

import re

import pytest
import torch

from ibaml.checks import require_cpu_generator, require_positive_int


def test_what_is_right_is_returned():
    generator = torch.Generator()
    assert require_positive_int("num_ways", 5) == 5 and require_cpu_generator(generator) is generator


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, ValueError, "num_ways must be at least 1, got 0; pass a positive count."),
        (2.0, TypeError, "num_ways must be an int, got 2.0 of type float."),
        (True, TypeError, "num_ways must be an int, got True of type bool."),
    ],
)
def test_counts(value, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        require_positive_int("num_ways", value)


def test_generators():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int; pass torch.Generator\(\)"):
        require_cpu_generator(3)
    with pytest.raises(ValueError, match="generator must live on the cpu, got meta"):
        require_cpu_generator(OnMeta())


class OnMeta(torch.Generator):
    """A generator elsewhere, without a device."""

    device = torch.device("meta")
