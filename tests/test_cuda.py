"""Everything that a user does, on CUDA against the CPU's numbers: ``make test-cuda``.

Where there is no device, the same body runs on the CPU against itself, so that it cannot rot.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ibaml import MetaLearner, tree
from ibaml.algorithms import ALGORITHMS, make_algorithm
from ibaml.algorithms.heads.gaussian import HeadOfFunctions
from ibaml.networks import MLP, Conv4
from ibaml.solvers.inner import GradientDescent
from ibaml.train import TrainerSettings
from ibaml.types import Batch, Episode, Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
# Single precision: convolutions in TF32 have three digits, and conjugate gradients lose some.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 3e-2}
NUM_STEPS = 4
SETTINGS = TrainerSettings(num_steps=NUM_STEPS, tasks_per_step=2, validate_every=2, num_validation_tasks=3, log_every=1)


class Setting(NamedTuple):
    """A network with tasks; sizes are odd, so that nothing is aligned by chance."""

    likelihood: str
    network: nn.Module
    tasks: list[Episode]


def images(dtype: torch.dtype) -> Setting:
    network = Conv4(3, image_size=8, channels=5, generator=torch.Generator().manual_seed(0))
    return Setting("categorical", network.to(dtype), episodes((1, 8, 8), dtype, is_regression=False))


def curves(dtype: torch.dtype) -> Setting:
    network = MLP(1, input_shape=3, hidden_sizes=(7,), generator=torch.Generator().manual_seed(0))
    return Setting("gaussian", network.to(dtype), episodes((3,), dtype, is_regression=True))


def episodes(shape: tuple[int, ...], dtype: torch.dtype, *, is_regression: bool) -> list[Episode]:
    generator = torch.Generator().manual_seed(1)

    def batch(size: int) -> Batch:
        y = torch.arange(size) % 3
        x = torch.randn(size, *shape, generator=generator, dtype=dtype) + y.reshape(-1, *[1] * len(shape))
        return Batch(x, y.to(dtype).unsqueeze(1) if is_regression else y)

    return [Episode(batch(6), batch(9)) for _ in range(6)]


def learner_of(name: str, setting: Setting, device: str) -> MetaLearner:
    known = {field.name for field in dataclasses.fields(ALGORITHMS[name])}
    wanted = {"inner": GradientDescent(num_steps=2, learning_rate=0.02), "num_samples": 2, "num_evaluation_samples": 4}
    algorithm = make_algorithm(name, **{option: value for option, value in wanted.items() if option in known})
    return MetaLearner(setting.network, algorithm, setting.likelihood, device=device)


def outcome(name: str, build: Any, dtype: torch.dtype, device: str, folder: Path) -> list[Tensor]:
    """Trains, is interrupted, resumes, validates, evaluates, adapts, predicts, saves and loads; returns all numbers."""
    setting = build(dtype)
    train, test = setting.tasks[:4], setting.tasks[4:]
    learner_of(name, setting, device).fit(train, test, settings=SETTINGS, num_steps=2, run_folder=folder / "run")
    learner = learner_of(name, setting, device).fit(train, test, settings=SETTINGS, run_folder=folder / "run")
    learner.save(folder / "saved")
    loaded = MetaLearner.load(folder / "saved", network=build(dtype).network, device=device)
    numbers: list[Tensor] = tree.leaves(learner.meta_parameters)
    for each in (learner, loaded):
        posterior = each.adapt(*test[0].support)
        prediction: Any = posterior.predict(test[0].query.x)
        numbers += tree.leaves(posterior.value)
        numbers.append(prediction.mean if build is curves else prediction.probs)
        report = each.evaluate(test)
        numbers.append(torch.tensor([report["nll"].mean]))
    return [number.detach().cpu().double() for number in numbers]


ON_CPU = {
    ("maml", curves, torch.float64),
    ("ibaml", images, torch.float32),
    ("linear_gaussian", curves, torch.float64),
    ("softmax", images, torch.float32),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["double", "single"])
@pytest.mark.parametrize("build", [images, curves])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_everything_gives_the_numbers_of_the_cpu(
    name: str, build: Any, dtype: torch.dtype, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and (name, build, dtype) not in ON_CPU:
        pytest.skip("four cases show that the script runs")
    if ALGORITHMS[name].uses_features and issubclass(ALGORITHMS[name], HeadOfFunctions) != (build is curves):
        pytest.skip("this head is for tasks of the other kind")
    expected = outcome(name, build, dtype, "cpu", tmp_path / "cpu")
    # On a device programs are written and captured, however short the training.
    if device == "cuda":
        monkeypatch.setattr("ibaml.train.trainer.NUM_CALLS_THAT_PAY", 1)
    found = outcome(name, build, dtype, device, tmp_path / "device")
    tolerance = 0 if device == "cpu" else TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
