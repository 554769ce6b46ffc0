"""The scores of an evaluation, and what they are scores of."""

from collections.abc import Mapping

from ibaml.metrics import Estimate, Sizes
from ibaml.train.evaluate import Evaluation


class EvaluationReport(dict[str, Estimate]):
    """Scores by name, which compare as a dict of them; ``str`` says first what tasks they are of.

    Args:
        evaluation: The evaluation.

    Attributes:
        num_tasks: Number of different tasks.
        num_draws: How often one of them was used: more than ``num_tasks`` where a sampler drew some of them again.
        num_support: How many examples of a task were known.
        num_query: How many were predicted.
        left_out: Names of tasks that were given and not used, and why.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__(evaluation.report)
        self.num_tasks = len(set(evaluation.sources))
        self.num_draws = len(evaluation.sources)
        self.num_support = Sizes.of(evaluation.num_support)
        self.num_query = Sizes.of([len(targets) for targets in evaluation.query_targets])
        self.left_out: Mapping[str, str] = dict(evaluation.left_out)

    @property
    def headline(self) -> str:
        """What the scores are of, in one line."""
        drawn = f"{self.num_draws} draws of " if self.num_draws > self.num_tasks else ""
        tasks = f"{self.num_tasks} task{'' if self.num_tasks == 1 else 's'}"
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"{drawn}{tasks} with {self.num_support} known and {self.num_query} predicted examples{left_out}"

    def __str__(self) -> str:
        """Returns a line on the tasks, and one for each score."""
        width = max(map(len, self), default=0)
        return "\n".join([self.headline, *(f"{name:<{width}}  {value}" for name, value in self.items())])

    def __repr__(self) -> str:
        """As ``str``: what a user wants to see of it."""
        return str(self)
