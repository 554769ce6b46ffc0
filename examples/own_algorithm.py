"""An algorithm of one's own in twenty lines: prototypes that are shrunk, proved by the contract suite and then used.

A class mean of one example is a noisy one. Shrunk towards the mean of all, as far as there is little data, it may be
better: `mean_c = (sum of the examples + k mean of all) / (count + k)`. `ibaml.testing.AlgorithmContract` says what
every algorithm has to keep (exact gradients, the same answers after storage, ...) and whether this one does; a test
file has its two lines, `class TestShrunken(testing.AlgorithmContract): make = Shrunken`, and pytest collects them.
"""

import argparse
import dataclasses
import math
from typing import ClassVar

import torch

from ibaml import MetaLearner, SplitSettings, testing
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.heads import Prototypes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunken(Prototypes):
    """Prototypes that are shrunk towards the mean of the support set, as `strength` examples there would."""

    strength: float = 1.0

    name: ClassVar[str] = "shrunken"

    def __post_init__(self):
        """Refuses settings out of range."""
        super().__post_init__()
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be 0 or positive and finite, but is {self.strength}.")

    def solve(self, prior, shared, support, num_outputs):
        """Returns the class means, shrunk; see ``Head``."""
        solution, residual = super().solve(prior, shared, support, num_outputs)
        counts = solution.counts.unsqueeze(-1)
        middle = (counts * solution.means).sum(-2) / counts.sum()
        means = (counts * solution.means + self.strength * middle) / (counts + self.strength)
        # A class without examples stays as it was: nothing is known of it.
        return solution._replace(means=torch.where(counts > 0, means, solution.means)), residual


class ShrunkenContract(testing.AlgorithmContract):
    """What has to hold, on tasks of classes, with the last layer adapted."""

    make = Shrunken
    adapt = "2.*"
    likelihood = "categorical"


def make_task(generator: torch.Generator):
    """Five clusters in twenty dimensions, of which four tell them apart; six points of each."""
    centres = torch.zeros(5, 20)
    centres[:, :4] = 1.2 * torch.randn(5, 4, generator=generator)
    labels = torch.arange(5).repeat_interleave(6)
    return (centres[labels] + torch.randn(30, 20, generator=generator)).numpy(), labels.numpy()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="meta-steps of training")
    parser.add_argument("--no-contract", action="store_true", help="leave the contract suite out")
    options = parser.parse_args(arguments)
    if not options.no_contract:
        found = testing.failures(ShrunkenContract)
        print("The contract is kept." if not found else f"The contract is broken: {found}")

    generator = torch.Generator().manual_seed(0)
    train, test = ([make_task(generator) for _ in range(count)] for count in (60, 60))
    splits = SplitSettings(num_support=5)  # one example of each class
    for algorithm in (make_algorithm("prototypes"), Shrunken(strength=1.0)):
        learner = MetaLearner(algorithm=algorithm, classes="per_task", seed=0)
        report = learner.fit(train, 0.2, splits=splits, num_steps=options.steps).evaluate(test)
        print(f"{algorithm.name}: accuracy {report['accuracy']}, nll {report['nll']}")


if __name__ == "__main__":
    main()
