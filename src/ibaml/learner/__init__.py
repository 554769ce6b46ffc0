"""The learner that most users need: fitting, adaptation, evaluation, and the folder that it is saved in."""

from ibaml.learner.estimator import NotFittedError
from ibaml.learner.learner import MetaLearner
from ibaml.posterior import TaskPosterior

__all__ = ["MetaLearner", "NotFittedError", "TaskPosterior"]
