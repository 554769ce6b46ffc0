"""Reports of users of such libraries that have no other place: recurrent networks, and fits that stay in memory."""

import numpy as np
import pytest
import torch
import torch.fx.graph_module as graph_module
from torch import nn

from ibaml import MetaLearner, TrainerSettings
from ibaml.data import SinusoidTasks
from ibaml.networks import MLP

RNG = np.random.default_rng(0)
SEQUENCES = [(x, x.sum(2)[:, -1]) for x in RNG.normal(size=(6, 8, 5, 2))]


class Sequence(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    num_outputs = 1

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = kind(2, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("algorithm", ["maml", "head"])
def test_recurrent_networks_are_trained_as_one_task_at_a_time(kind, algorithm):
    """They cannot be mapped over tasks, and nobody has to know that."""

    def fit(tasks_per_chunk: int | None) -> dict[str, torch.Tensor]:
        settings = TrainerSettings(num_steps=2, tasks_per_step=2, tasks_per_chunk=tasks_per_chunk)
        learner = MetaLearner(Sequence(kind), algorithm, likelihood="gaussian", adapt="head.*")
        return dict(learner.fit(SEQUENCES, settings=settings).meta_parameters.shared)

    found, expected = fit(None), fit(1)
    assert any(name.startswith("body.") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_fits_leave_no_programs_behind():
    """Ten thousand of them would take a gigabyte."""

    def fit() -> int:
        network = MLP(1, input_shape=1, hidden_sizes=(4,))
        settings = TrainerSettings(num_steps=1, tasks_per_step=2)
        MetaLearner(network, "ibaml", likelihood="gaussian").fit(
            SinusoidTasks(num_shots=3, num_queries=3), settings=settings
        )
        return len(graph_module._loader.eval_cache)

    before = fit()
    assert fit() == before
