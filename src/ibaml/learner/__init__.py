"""The learner that most users need: fitting, adaptation, evaluation, and the folder that it is saved in."""

from ibaml.learner.learner import MetaLearner, NotFittedError
from ibaml.posterior import TaskPosterior

__all__ = ["MetaLearner", "NotFittedError", "TaskPosterior"]
