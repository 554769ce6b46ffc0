"""A fitted model, and what it knows of a task."""

from ibaml.posterior.fitted import FittedModel
from ibaml.posterior.task import TaskPosterior

__all__ = ["FittedModel", "TaskPosterior"]
