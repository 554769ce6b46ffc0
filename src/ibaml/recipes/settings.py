"""What a recipe consists of, and how it is stored as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from ibaml import records
from ibaml.data.sources import SOURCES, TaskSource
from ibaml.learner import MetaLearner
from ibaml.learner.folder import RECORDS
from ibaml.learner.settings import LearnerSettings
from ibaml.networks import NetworkSettings
from ibaml.train.settings import TrainerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(LearnerSettings):
    """A complete configuration of a training run and its evaluation: settings of a learner, its data and its training.

    Attributes:
        name: Name on the command line.
        description: One sentence for a reader.
        data: Source of the tasks, one of ``ibaml.data.sources``.
        trainer: Settings of the outer loop. Their seed is that of the initial weights as well.
        num_test_tasks: Tasks of an evaluation.
    """

    name: str
    description: str
    network: NetworkSettings
    data: TaskSource
    trainer: TrainerSettings
    num_test_tasks: int = 600

    def __post_init__(self) -> None:
        """Refuses what no learner takes, and an evaluation of no tasks."""
        super().__post_init__()
        if self.num_test_tasks < 1:
            raise ValueError(f"num_test_tasks must be at least 1, but is {self.num_test_tasks}.")

    def learner(self, *, device: torch.device | str = "cpu") -> MetaLearner:
        """Builds the learner, not yet fitted; ``learner.fit(..., settings=recipe.trainer)`` trains the recipe.

        Args:
            device: Where to compute.

        Raises:
            ValueError: If the network or a pattern is refused.
        """
        return MetaLearner.from_settings(self, device=device, seed=self.trainer.seed)

    def replace(self, changes: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe with some settings changed.

        Args:
            changes: Dotted setting to its value, such as ``{"trainer.num_steps": 10}``.

        Raises:
            ValueError: If there is no such setting (with the nearest name) or a value is refused.

        Examples:
            >>> from ibaml.recipes import get_recipe
            >>> get_recipe("sinusoid_5shot_maml").replace({"trainer.num_steps": 10}).trainer.num_steps
            10
        """
        return records.replace(self, changes)

    def to_json(self) -> str:
        """Returns the recipe as JSON."""
        return json.dumps(records.to_json(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Rebuilds a recipe from ``to_json``.

        Raises:
            ValueError: If the text is no recipe.
        """
        try:
            recipe = records.from_json(json.loads(text), (*RECORDS, *SOURCES.values(), TrainerSettings, Recipe))
        except ValueError as error:
            raise ValueError(f"this is no recipe of this version of ibaml: {error}") from error
        if not isinstance(recipe, Recipe):
            raise ValueError(f"this is no recipe of this version of ibaml: it holds a {type(recipe).__name__}.")
        return recipe
