"""What training does when the device is lost, shown by a network that raises as a failed kernel would."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.data import SinusoidTasks
from ibaml.fast import DeviceLostError
from ibaml.likelihoods import make_likelihood
from ibaml.solvers.inner import GradientDescent
from ibaml.train import Trainer, TrainerSettings
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.types import Tensor

TASKS = SinusoidTasks(num_shots=2, num_queries=2)


class Failing(nn.Module):
    """A linear network whose kernels fail after so many passes, and ever after."""

    error: Exception = RuntimeError()
    num_passes: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.num_passes is not None:
            self.num_passes -= 1
            if self.num_passes < 0:
                raise self.error
        return self.linear(x)


def trainer(network: nn.Module, folder: Path | None) -> Trainer:
    algorithm = make_algorithm("fomaml", inner=GradientDescent(num_steps=1, learning_rate=0.01))
    model = build_model(network, make_likelihood("gaussian", 1))
    settings = TrainerSettings(num_steps=4, tasks_per_step=1, checkpoint_every=1, tasks_per_chunk=1, fast=False)
    return Trainer(model, algorithm, settings, run_folder=folder)


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error: misaligned address\n"), RuntimeError("CUDA error: misaligned address")],
)
def test_training_ends_with_one_sentence_and_the_last_checkpoint(tmp_path: Path, error: Exception) -> None:
    torch.manual_seed(0)
    network = Failing()
    network.error, network.num_passes = error, 9
    with pytest.raises(DeviceLostError) as caught:
        trainer(network, tmp_path).fit(TASKS)
    message = str(caught.value)
    step = load_tensors(tmp_path / CHECKPOINT)[1]["step"]
    assert 1 <= step < 4
    assert message.startswith(f"step {step + 1}: CUDA error: misaligned address. No further step is possible in this")
    assert f"The last checkpoint is {tmp_path / CHECKPOINT}: the same command resumes from it" in message
    assert message.endswith("If it happens again, try fast=False, which neither captures nor replays.")
    network.num_passes = None
    assert trainer(network, tmp_path).fit(TASKS).num_steps == 4


def test_other_errors_pass(tmp_path: Path) -> None:
    network = Failing()
    network.error, network.num_passes = RuntimeError("of the network"), 9
    with pytest.raises(RuntimeError, match="^of the network$"):
        trainer(network, tmp_path).fit(TASKS)
