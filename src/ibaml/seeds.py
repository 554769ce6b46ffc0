"""The one rule by which tasks, and the noise of adapting to them and predicting for them, are drawn from seeds.

Task ``i`` of the fixed set named by ``seed`` has the seed ``task_seed(seed, i)``. From it come the draw of the task
(``task_generator``), the noise of its inner problem and that of its weight samples (``noise_generator``), three streams
that share nothing. So a task is the same for every algorithm and however the tasks are shared out among processes,
which is what paired comparisons need, and an evaluation is, up to rounding, the same as to call, for each task,
``learner.adapt(x, y, seed=task_seed(seed, i)).predict(x_query, seed=task_seed(seed, i))``.
"""

import functools
from typing import Literal

import torch

from ibaml.checks import require_int

_SEED_STRIDE = 1_000_003
_PURPOSES = ("inner", "prediction")


def task_seed(seed: int, index: int) -> int:
    """Returns the seed of task ``index`` in the fixed set of tasks named by ``seed``.

    Raises:
        TypeError: If the seed is no integer.
    """
    return require_int("seed", seed) * _SEED_STRIDE + index


def task_generator(seed: int, index: int) -> torch.Generator:
    """Returns the generator that draws task ``index`` of the fixed set of tasks named by ``seed``; errors likewise."""
    return torch.Generator().manual_seed(task_seed(seed, index))


def noise_generator(purpose: Literal["inner", "prediction"], seed: int) -> torch.Generator:
    """Returns the generator of one task's noise.

    Args:
        purpose: ``"inner"``: of the inner problem; ``"prediction"``: of the weight samples.
        seed: Seed of the adaptation, or of the prediction.

    Raises:
        TypeError: If it is no integer.
    """
    drawn = _of_purposes(require_int("seed", seed))
    return torch.Generator().manual_seed(drawn[_PURPOSES.index(purpose)])


@functools.lru_cache(maxsize=1024)
def _of_purposes(seed: int) -> list[int]:
    # A large offset is no other stream: the CPU's generator takes the low 32 bits of a seed alone.
    return torch.randint(2**32, (len(_PURPOSES),), generator=torch.Generator().manual_seed(seed)).tolist()
