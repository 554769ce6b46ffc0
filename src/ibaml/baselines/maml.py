"""MAML on the learner's network (Finn et al. 2017)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.tail import last_layer
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.training import Setting, train
from ibaml.solvers.inner import Adam, GradientDescent


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAgnostic:
    """Initial weights of the learner's network from which a few steps lead to any task, trained as long as the learner.

    Attributes:
        num_steps: Steps of gradient descent on all weights.
        learning_rates: Their sizes, tried in short trials; 20 steps of Adam on the last layer alone are tried as well.
    """

    num_steps: int = 5
    learning_rates: tuple[float, ...] = (0.01, 0.1, 0.4)

    name: ClassVar[str] = "maml"

    def suits(self, problem: Problem) -> bool:
        """True."""
        del problem
        return True

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Trains; see ``Baseline``."""
        of_all: list[tuple[str, Any, str]] = [
            (
                f"{self.num_steps} inner steps of {rate:g}",
                GradientDescent(num_steps=self.num_steps, learning_rate=rate),
                "*",
            )
            for rate in self.learning_rates
        ]
        network = problem.learner.network
        assert network is not None
        of_last = ("20 inner steps of Adam, 0.1, on the last layer", Adam(num_steps=20, learning_rate=0.1))
        settings: list[Setting] = []
        refusals: list[ValueError] = []
        for described, inner, adapt in [*of_all, (*of_last, last_layer(network))]:
            try:
                learner = problem.same_network(make_algorithm(self.name, inner=inner), adapt=adapt)
            except ValueError as error:
                # Running statistics may not come after what is adapted.
                refusals.append(error)
                continue
            settings.append(Setting(described, learner, problem.settings))
        if not settings:
            raise refusals[0]
        return train(problem, settings, seconds=seconds, folder=folder)
