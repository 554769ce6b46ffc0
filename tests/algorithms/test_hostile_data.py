"""Every algorithm trains on data at which roots, logarithms and divisions have no derivative."""

import csv
from pathlib import Path

import pytest
import torch

from ibaml import Batch, Episode, MetaLearner, TrainerSettings, tree
from ibaml.algorithms import ALGORITHMS, make_algorithm
from ibaml.algorithms.heads import Head
from ibaml.networks import MLP
from ibaml.types import Tensor

OF_NUMBERS = ("linear_gaussian", "gp", "generalized_linear", "neighbours")
DRAW = torch.Generator().manual_seed(0)
BITS = torch.randint(2, (6, 3), generator=DRAW).float() * torch.tensor([1.0, 1.0, 0.0])
INPUTS: dict[str, Tensor] = {
    "zeros and ones": BITS,
    "nothing but zeros": torch.zeros(6, 3),
    "constant columns": torch.tensor([1.0, 0.0, 1.0]) * BITS + torch.tensor([0.0, 7.0, 0.0]),
    "identical rows": torch.ones(6, 3),
    "one row": BITS[:1],
}


class InTurn:
    """Draws the given tasks one after the other."""

    input_shape, has_equal_sizes = (3,), False

    def __init__(self, episodes: list[Episode], num_outputs: int) -> None:
        self.episodes, self.num_outputs, self.calls = episodes, num_outputs, 0

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        self.calls += 1
        return tree.map(lambda leaf: leaf.unsqueeze(0), self.episodes[self.calls % len(self.episodes)])


def targets(size: int, *, are_numbers: bool) -> list[Tensor]:
    """Numbers that a network of zeros predicts exactly, and others; all of one class, and of two."""
    if are_numbers:
        return [torch.zeros(size, 1), torch.arange(size).float().unsqueeze(1)]
    return [torch.zeros(size, dtype=torch.int64), torch.arange(size) % 2]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_stays_finite(name: str, tmp_path: Path) -> None:
    are_numbers = name in OF_NUMBERS or not issubclass(ALGORITHMS[name], Head)
    batches = [Batch(x, y) for x in INPUTS.values() for y in targets(len(x), are_numbers=are_numbers)]
    num_outputs = 1 if are_numbers else 2
    network = MLP(
        num_outputs, input_shape=3, hidden_sizes=(4,), norm="none", generator=torch.Generator().manual_seed(0)
    )
    for parameter in list(network.parameters())[-2:]:
        # Of a network of zeros many gradients are exactly zero.
        torch.nn.init.zeros_(parameter)
    learner = MetaLearner(network, make_algorithm(name), "gaussian" if are_numbers else "categorical")
    settings = TrainerSettings(num_steps=len(batches), tasks_per_step=1, log_every=1, fast=False)
    learner.fit(
        InTurn([Episode(batch, batch) for batch in batches], num_outputs), settings=settings, run_folder=tmp_path
    )
    assert bool(tree.all_finite(learner.meta_parameters))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(batches) and all(torch.tensor(float(row["gradient_norm"])).isfinite() for row in rows)
    for batch in batches[::3]:
        prediction = learner.adapt(*batch).predict(INPUTS["zeros and ones"])
        assert bool(torch.isfinite(prediction.total_uncertainty).all())
