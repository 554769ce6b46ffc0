"""Training: the loop over tasks, its settings, its checkpoints and what it logs."""

from ibaml.train.result import TrainingDivergedError, TrainingResult
from ibaml.train.settings import TrainerSettings
from ibaml.train.trainer import Trainer

__all__ = ["Trainer", "TrainerSettings", "TrainingDivergedError", "TrainingResult"]
