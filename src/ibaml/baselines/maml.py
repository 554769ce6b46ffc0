"""MAML on the learner's network (Finn et al. 2017)."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.tail import last_layer
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.training import Setting, train
from ibaml.solvers.inner import Adam, GradientDescent, InnerSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAgnostic:
    """Initial weights of the learner's network from which a few steps lead to any task, trained as long as the learner.

    Attributes:
        num_steps: Steps of gradient descent on all weights.
        learning_rates: Their sizes, tried in short trials; steps on the last layer alone are tried as well.
    """

    num_steps: int = 5
    learning_rates: tuple[float, ...] = (0.01, 0.1, 0.4)

    name: ClassVar[str] = "maml"

    def suits(self, problem: Problem) -> bool:
        """Whether all targets were measured."""
        return not problem.has_unmeasured_targets

    def settings(self, problem: Problem) -> list[Setting]:
        """Returns the inner solvers that suit the network; see ``TrainedBaseline``."""
        network = problem.learner.network
        assert network is not None
        # Running statistics may not come after what is adapted, and those of a query set would tell of one another.
        regrouped = {"norm": "group"} if getattr(network, "norm", None) == "running" else {}
        how = ", group normalisation" if regrouped else ""
        tried: list[tuple[str, InnerSolver, str, dict[str, str]]] = [
            (f"{self.num_steps} inner steps of {rate:g}{how}", self._descent(rate), "*", regrouped)
            for rate in self.learning_rates
        ]
        of_last = {
            f"{self.num_steps} inner steps of 0.1": self._descent(0.1),
            "20 inner steps of Adam, 0.1": Adam(num_steps=20, learning_rate=0.1),
        }
        tried += [
            (f"{described}, on the last layer", inner, last_layer(network), {}) for described, inner in of_last.items()
        ]
        settings: list[Setting] = []
        refusals: list[ValueError] = []
        for described, inner, adapt, changes in tried:
            try:
                learner = problem.same_network(make_algorithm(self.name, inner=inner), adapt=adapt, **changes)
            except ValueError as error:
                refusals.append(error)
            else:
                settings.append(Setting(described, learner, problem.settings))
        if not settings:
            raise refusals[0]
        return settings

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Trains; see ``Baseline``."""
        tasks = problem.with_ways(problem.learner.model.num_outputs)
        return train(tasks, self.settings(problem), seconds=seconds, folder=folder)

    def _descent(self, learning_rate: float) -> GradientDescent:
        return GradientDescent(num_steps=self.num_steps, learning_rate=learning_rate)
