"""Settings and results of Fig. 2."""

import dataclasses
from typing import Literal, NamedTuple, TypeAlias, get_args

from ibaml.experiments.report import require_at_least

AlgorithmName: TypeAlias = Literal["maml", "imaml", "abml", "ibaml"]
DISPLAY_NAMES = {"maml": "MAML", "imaml": "iMAML", "abml": "ABML", "ibaml": "iBaML"}
EXPLICIT: tuple[AlgorithmName, ...] = ("maml", "abml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fig2Settings:
    """Settings of the experiment; the defaults are the paper's network and task, Conv4-32 with max-pooling.

    Attributes:
        inner_steps: Numbers K of inner steps.
        linear_steps: Numbers L of conjugate gradient steps, for the implicit algorithms.
        algorithms: Which of "maml", "imaml", "abml" and "ibaml".
        device: "auto" (CUDA if present), "cpu" or "cuda".
        num_channels: Channels of every block of the network.
        image_size: Side of the square images of three channels.
        num_ways: Classes of the task.
        num_shots: Support images per class.
        num_queries: Query images per class.
        num_samples: Weight samples S of ABML and iBaML; each costs one pass through the network.
        num_repeats: Timed repeats of every point.
        num_threads: CPU threads; None leaves torch its choice.
        seed: Seed of images, initial weights and noise.
    """

    inner_steps: tuple[int, ...] = (1, 5, 10, 15, 20, 30)
    linear_steps: tuple[int, ...] = (5, 10)
    algorithms: tuple[AlgorithmName, ...] = ("maml", "imaml", "abml", "ibaml")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_channels: int = 32
    image_size: int = 84
    num_ways: int = 5
    num_shots: int = 1
    num_queries: int = 15
    num_samples: int = 1
    num_repeats: int = 4
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("inner_steps", "linear_steps"):
            steps = getattr(self, field)
            if not steps or min(steps) < 1 or len({*steps}) < len(steps):
                raise ValueError(f"{field} must be one or more different numbers of at least 1, but is {steps}.")
        known = get_args(AlgorithmName)
        if not self.algorithms or {*self.algorithms} - {*known} or len({*self.algorithms}) < len(self.algorithms):
            raise ValueError(f"algorithms must be one or more of {', '.join(known)}, but is {self.algorithms}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, but is {self.device!r}.")
        require_at_least(self, 2, "num_ways")
        fields = ("num_channels", "image_size", "num_shots", "num_queries", "num_samples", "num_repeats")
        require_at_least(self, 1, *fields)
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1 or None, but is {self.num_threads}.")


class Duration(NamedTuple):
    """How long the repeats of one measurement took, in seconds.

    Attributes:
        median: Of the repeats.
        shortest: What else happens on the machine can only add to a time, so this is the cleanest value.
        longest: The other end of the spread.
    """

    median: float
    shortest: float
    longest: float


class CostPoint(NamedTuple):
    """The cost of one hypergradient of one task.

    A gradient or product is that of the mean nll of one batch under one weight sample.

    Attributes:
        algorithm: "maml", "imaml", "abml" or "ibaml".
        num_inner_steps: K.
        num_linear_steps: L; None for the explicit algorithms.
        forward_seconds: Time of the inner solve and the outer loss.
        backward_seconds: Time of the hypergradient after that.
        total_seconds: Time of both.
        peak_bytes: Peak memory over both halves.
        num_forward_gradients: Gradients during the forward half.
        num_backward_gradients: Gradients during the backward half.
        num_hvps: Hessian-vector products that were really made; an unrolled step costs one.
    """

    algorithm: AlgorithmName
    num_inner_steps: int
    num_linear_steps: int | None
    forward_seconds: Duration
    backward_seconds: Duration
    total_seconds: Duration
    peak_bytes: int
    num_forward_gradients: int
    num_backward_gradients: int
    num_hvps: int


class Fig2Result(NamedTuple):
    """All points of the experiment.

    Attributes:
        settings: The settings, with the device that "auto" stood for.
        device: Hardware, number of threads and version of torch.
        points: Curve by curve, in the order of ``settings``.
    """

    settings: Fig2Settings
    device: str
    points: list[CostPoint]


def curve_name(algorithm: AlgorithmName, num_linear_steps: int | None) -> str:
    """Returns the name of a curve for readers.

    Examples:
        >>> curve_name("maml", None), curve_name("ibaml", 5)
        ('MAML', 'iBaML, L = 5')
    """
    name = DISPLAY_NAMES[algorithm]
    return name if num_linear_steps is None else f"{name}, L = {num_linear_steps}"
