"""Training: the loop over tasks, its settings, its checkpoints and what it logs."""

from ibaml.train.settings import TrainerSettings
from ibaml.train.trainer import Trainer, TrainingDivergedError, TrainingResult

__all__ = ["Trainer", "TrainerSettings", "TrainingDivergedError", "TrainingResult"]
