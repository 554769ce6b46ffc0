"""Low-rank adapters in a backbone: nothing changes at their start, and they alone are learned."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ibaml import MetaLearner
from ibaml.backbones import low_rank
from ibaml.train import TrainerSettings

RNG = np.random.default_rng(0)
TASKS = [(RNG.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 2) for _ in range(4)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))


def test_adapters_alone_are_learned(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    module = network()
    adapted = low_rank(module, ["0", "2"], rank=2)
    x = torch.from_numpy(TASKS[0][0])
    torch.testing.assert_close(adapted(x), module(x))
    again = dict(low_rank(module, ["0", "2"], rank=2).named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in adapted.named_parameters())
    settings = TrainerSettings(num_steps=3, tasks_per_step=2, fine_tune_learning_rate=0.1)
    learner = MetaLearner(backbone=adapted, fine_tune="*lora_*", classes="per_task").fit(TASKS, settings=settings)
    shared = learner.meta_parameters.shared
    assert len(shared) == 4 and all("lora_" in name and bool(value.any()) for name, value in shared.items())
    x, y = TASKS[0]
    expected = learner.adapt(x[:6], y[:6]).predict(x[6:]).probs
    loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=low_rank(network(), ["0", "2"], rank=2))
    np.testing.assert_allclose(loaded.adapt(x[:6], y[:6]).predict(x[6:]).probs, expected, rtol=1e-6)


def test_layers_that_are_not_there():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"layers is \['query'\], which peft does not adapt .*; there are 0"):
        low_rank(network(), ["query"])
    with pytest.raises(ValueError, match="rank must be"):
        low_rank(network(), ["0"], rank=0)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"this needs peft, .* pip install 'ibaml\[peft\]'"):
        low_rank(network(), ["0"])
