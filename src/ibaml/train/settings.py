"""Settings of the outer loop."""

import dataclasses
import math
from typing import Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["float32", "bfloat16"]
"""What features are computed in: ``"float32"`` stands for the type of the weights, whatever it is."""

ONLY_HOW = ("fast", "compile", "tasks_per_chunk", "max_examples_per_pass")
"""Settings of how the same numbers are computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Settings of the outer loop.

    Attributes:
        num_steps: Number of meta-steps.
        tasks_per_step: Tasks whose hypergradients are averaged in a step.
        learning_rate: Adam's learning rate for means, weights and shared parameters.
        log_var_learning_rate: Adam's learning rate for the prior's log-variances (None: ``learning_rate``).
        fine_tune_learning_rate: Adam's learning rate for the parameters of a backbone (``MetaLearner(fine_tune=...)``).
        weight_decay: Decoupled weight decay (AdamW, Loshchilov and Hutter 2019) of shared weights: beside Adam's step
            each loses this times the learning rate of itself. Not of biases, of normalisation layers, of the prior and
            of the likelihood. None: no decay.
        schedule: ``"constant"``, or ``"cosine"``: half a cosine from the learning rate to zero over ``num_steps``.
        gradient_clip: Largest Euclidean norm of the averaged hypergradient; longer ones are shortened. None: no limit.
        validate_every: Steps between validations.
        num_validation_tasks: Tasks of a validation; always the same ones.
        checkpoint_every: Steps between checkpoints (validations also write one).
        log_every: Steps that one row of ``metrics.csv`` averages.
        tasks_per_chunk: Tasks computed at once by ``torch.func.vmap``; 1: a plain loop. None: one if the network has
            convolutions, which gain nothing from more, else all of a step.
        fast: False switches off all that ``ibaml.train.step`` does for speed; results agree up to rounding.
        compile: Compile the network's passes as well: on CUDA 1.5 times faster each, after a minute of compiling.
        max_examples_per_pass: Pass at most so many examples of a task through the network at a time, for support sets
            larger than memory; not with batch normalisation.
        precision: What the features of a head are computed in during training: ``"bfloat16"`` rounds the arguments of
            convolutions and matrix products (weights, the head, and predictions keep theirs); twice as fast on
            processors that have it (AVX-512 BF16, AMX, CUDA), slower on others.
        output_temperature: Fit, at every validation, one number by which predictions are made more or less sure (Guo
            et al. 2017), judge the state with it, and keep it with the chosen one.
        draws: None: a step's tasks and noise come one after the other from one generator, and of several processes each
            draws all of them. ``"per_task"``: each task has a generator of its own, seeded from that one, and a process
            draws only its share, which many processes need (docs/scaling.md); other tasks than with None.
        seed: Seed of the training tasks and noise.
    """

    num_steps: int = 1000
    tasks_per_step: int = 4
    learning_rate: float = 1e-3
    log_var_learning_rate: float | None = None
    fine_tune_learning_rate: float = 1e-4
    weight_decay: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    gradient_clip: float | None = 10.0
    validate_every: int = 250
    num_validation_tasks: int = 100
    checkpoint_every: int = 250
    log_every: int = 10
    tasks_per_chunk: int | None = None
    fast: bool = True
    compile: bool = False
    max_examples_per_pass: int | None = None
    precision: Precision = "float32"
    output_temperature: bool = True
    draws: Literal["per_task"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        counts = (
            "num_steps",
            "tasks_per_step",
            "validate_every",
            "num_validation_tasks",
            "checkpoint_every",
            "log_every",
        )
        for field in (*counts, "tasks_per_chunk", "max_examples_per_pass"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, but is {value}.")
        rates = ("learning_rate", "log_var_learning_rate", "fine_tune_learning_rate", "weight_decay", "gradient_clip")
        for field in rates:
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite, but is {value}.")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', but is {self.schedule!r}.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', but is {self.precision!r}.")
        if self.draws not in ("per_task", None):
            raise ValueError(f"draws must be 'per_task' or None, but is {self.draws!r}.")
