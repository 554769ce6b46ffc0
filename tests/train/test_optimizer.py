"""What moves at which rate, and what decays, beside torch's AdamW."""

import pytest
import torch
from torch import nn

from ibaml import Batch, Episode, MetaLearner, tree
from ibaml.backbones import Backbone
from ibaml.train import TrainerSettings
from ibaml.train.optimizer import decaying_weights, parameter_groups

RATE, WIDTH_RATE, DECAY = 3e-3, 1e-3, 0.2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(body, nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


def tasks() -> list[Episode]:
    def batch(number: int, seed: int) -> Batch:
        x = torch.randn(number, 1, 4, 4, generator=generator(seed))
        return Batch(x, torch.arange(number) % 2)

    return [Episode(batch(6, seed), batch(8, seed + 10)) for seed in range(5)]


def settings(**changes) -> TrainerSettings:
    return TrainerSettings(
        num_steps=1, tasks_per_step=2, learning_rate=RATE, log_var_learning_rate=WIDTH_RATE, **changes
    )


def test_weights_decay_and_nothing_else():
    assert decaying_weights(network()) == {"0.0.weight", "0.4.weight", "3.weight"}


@pytest.mark.parametrize("algorithm", ["softmax", "prototypes", "linear_gaussian"])
def test_steps_are_those_of_adamw(algorithm):
    """Five steps on drawn gradients: AdamW of torch on decaying weights, Adam on all else."""
    likelihood = "gaussian" if algorithm == "linear_gaussian" else "categorical"
    learner = MetaLearner(network(), algorithm, likelihood, adapt="3.*")
    model = learner.model
    meta = learner.algorithm.init(model.adapted, model.shared, generator=generator())
    meta = tree.map(lambda leaf: leaf.detach().clone(), meta)
    own = torch.optim.AdamW(parameter_groups(meta, learner.algorithm, model, settings(weight_decay=DECAY)))
    shared, others = {name: value.clone() for name, value in meta.shared.items()}, tree.map(torch.clone, meta.prior)
    decaying = ["0.0.weight", "0.4.weight"]
    widths = learner.algorithm.parameter_groups(others)[1]
    widths += [shared[name] for name in model.likelihood.initial_parameters()]
    is_width = {id(value) for value in widths}
    expected = [
        torch.optim.AdamW([shared[name] for name in decaying], lr=RATE, weight_decay=DECAY),
        torch.optim.Adam(
            [
                {"params": [value], "lr": WIDTH_RATE if id(value) in is_width else RATE}
                for value in (*tree.leaves(others), *(v for name, v in shared.items() if name not in decaying))
            ]
        ),
    ]
    for step in range(5):
        pairs = [*zip(tree.leaves(meta.prior), tree.leaves(others), strict=True)]
        pairs += [(meta.shared[name], shared[name]) for name in shared]
        for index, (mine, theirs) in enumerate(pairs):
            mine.grad = torch.randn(mine.shape, generator=generator(100 * step + index))
            theirs.grad = mine.grad.clone()
        for optimizer in (own, *expected):
            optimizer.step()
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_step_of_the_trainer():
    """The first step with decay is that without, less the rate times the decay of each weight."""

    def learned(**changes):
        learner = MetaLearner(network(), adapt="3.*", classes="per_task")
        return learner.fit(tasks(), settings=settings(**changes)).meta_parameters.shared

    plain, decayed, start = learned(), learned(weight_decay=DECAY), dict(network().named_parameters())
    for name, value in plain.items():
        change = -RATE * DECAY * start[name].detach() if name in ("0.0.weight", "0.4.weight") else torch.zeros(())
        torch.testing.assert_close(decayed[name], value + change, rtol=1e-6, atol=1e-7)


def test_a_fine_tuned_backbone_decays_at_its_own_rate():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    data = [(torch.randn(12, 3, generator=generator(seed)), torch.arange(12) % 2) for seed in range(4)]

    def learned(**changes):
        learner = MetaLearner(backbone=Backbone(module=module, cache=False), fine_tune="*", classes="per_task")
        return learner.fit(data, settings=settings(fine_tune_learning_rate=0.05, **changes)).meta_parameters.shared

    plain, decayed = learned(), learned(weight_decay=DECAY)
    change = decayed["backbone.0.weight"] - plain["backbone.0.weight"]
    torch.testing.assert_close(change, -0.05 * DECAY * module[0].weight.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(decayed["backbone.0.bias"], plain["backbone.0.bias"])


def test_nothing_to_decay():
    with pytest.raises(ValueError, match=r"weight_decay is 0.2, but no weight of the network \(Sequential\) is shared"):
        MetaLearner(network(), "maml", adapt="3.*", freeze="0.*").fit(tasks(), settings=settings(weight_decay=DECAY))


@pytest.mark.parametrize("value", [-0.1, 0.0, float("inf")])
def test_out_of_range(value):
    with pytest.raises(ValueError, match=f"weight_decay must be positive and finite, but is {value}"):
        TrainerSettings(weight_decay=value)
