"""A body is passed and differentiated once, keeps running statistics, and heads take tasks of any number of classes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ibaml import MetaLearner, tree
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import Categorical
from ibaml.networks import Conv4
from ibaml.train import Trainer, TrainerSettings
from ibaml.train.step import HypergradientStep
from ibaml.types import Batch, Episode, Tensor

NUM_TASKS = 3
SETTINGS = TrainerSettings(num_steps=4, tasks_per_step=2, validate_every=2, num_validation_tasks=3, checkpoint_every=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv(norm: Any, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    network = Conv4(3, image_size=6, channels=4, downsample="stride", norm=norm, generator=generator(1))
    return network.to(dtype)


def episodes(num_tasks: int = NUM_TASKS, *, num_classes: int = 3, seed: int = 0, dtype: Any = torch.float64) -> Episode:
    source = generator(seed)

    def batch(per_class: int) -> Batch:
        y = torch.arange(num_classes).repeat(per_class).expand(num_tasks, -1)
        x = torch.randn(*y.shape, 1, 6, 6, generator=source, dtype=dtype) + y[..., None, None, None]
        return Batch(x, y)

    return Episode(batch(2), batch(3))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", ["softmax", "prototypes", "gaussian_classes"])
def test_gradients_of_a_head_are_those_task_by_task(name: str, norm: str) -> None:
    """The pass of all examples together, against each task's own derivative through the whole network."""
    model = build_model(conv(norm), Categorical(), adapt="head.*")
    algorithm = make_algorithm(name)
    meta = algorithm.init(model.adapted, model.shared, generator=generator())
    tasks = episodes()
    noise = [algorithm.draw_noise(meta, generator=generator()) for _ in range(NUM_TASKS)]
    found = HypergradientStep(model, algorithm)(meta, tasks, noise)
    alone = [
        algorithm.hypergradient(model, meta, tree.map(lambda leaf, i=index: leaf[i], tasks), noise[index])
        for index in range(NUM_TASKS)
    ]
    total = alone[0][0]
    for gradient, _ in alone[1:]:
        total = tree.add(total, gradient)
    assert found.total.shared.keys() == total.shared.keys()
    for one, other in zip(tree.leaves(found.total), tree.leaves(total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.info.outer_loss, torch.stack([info.outer_loss for _, info in alone]))


def test_running_averages_move_as_those_of_torch() -> None:
    model = build_model(conv("running"), Categorical(), adapt="head.*")
    algorithm = make_algorithm("softmax")
    meta = algorithm.init(model.adapted, model.shared, generator=generator())
    before = tree.map(torch.clone, meta.shared)
    tasks = episodes()
    found = HypergradientStep(model, algorithm)(meta, tasks, [algorithm.draw_noise(meta, generator=generator())] * 3)
    network = conv("running").train()
    network(torch.cat([tasks.support.x, tasks.query.x], 1).flatten(0, 1))
    expected = dict(network.named_buffers())
    assert found.moved.keys() == model.statistics == {name for name in expected if "running" in name}
    for name, change in found.moved.items():
        torch.testing.assert_close(before[name] + change / NUM_TASKS, expected[name])
        assert not found.total.shared[name].any()
    assert all(torch.equal(value, before[name]) for name, value in meta.shared.items()), "nothing changes in place"
    assert not conv("running").get_buffer("features.1.running_mean").any()


def test_queries_are_judged_one_at_a_time_with_running_averages() -> None:
    tasks = episodes(6, dtype=torch.float32)
    split = [tree.map(lambda leaf, i=index: leaf[i], tasks) for index in range(6)]
    learner = MetaLearner(conv("running", dtype=torch.float32), classes="per_task").fit(split, settings=SETTINGS)
    posterior = learner.adapt(*split[0].support)
    together: Any = posterior.predict(split[0].query.x)
    apart: list[Any] = [posterior.predict(x.unsqueeze(0)) for x in split[0].query.x]
    torch.testing.assert_close(together.probs, torch.cat([one.probs for one in apart]), rtol=1e-4, atol=1e-6)


def test_running_averages_are_resumed_exactly(tmp_path: Path) -> None:
    tasks = episodes(6)
    split = [tree.map(lambda leaf, i=index: leaf[i], tasks) for index in range(6)]

    def fit(folder: Path, *, minutes: float | None = None) -> MetaLearner:
        learner = MetaLearner(conv("running"), classes="per_task")
        return learner.fit(split, split[:3], settings=SETTINGS, run_folder=folder, max_minutes=minutes)

    whole = fit(tmp_path / "whole")
    for _ in range(2):
        fit(tmp_path / "parts", minutes=1e-9)
    parts = fit(tmp_path / "parts")
    assert parts.training_result is not None and parts.training_result.num_steps == 4
    for one, other in zip(tree.leaves(whole.meta_parameters), tree.leaves(parts.meta_parameters), strict=True):
        assert torch.equal(one, other)
    loaded = MetaLearner.load(tmp_path / "parts")
    mean = "features.1.running_mean"
    assert loaded.meta_parameters.shared[mean].any()
    assert torch.equal(loaded.meta_parameters.shared[mean], parts.meta_parameters.shared[mean])


def test_running_averages_are_refused_where_they_would_leak() -> None:
    with pytest.raises(
        ValueError, match="network has running statistics in features.1 .BatchNorm2d., which is not bef"
    ):
        build_model(conv("running"), Categorical())
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="1 has momentum=None; expected a number such as 0.1"):
        build_model(network, Categorical(), adapt="2.*")


def test_tasks_of_any_number_of_classes_in_one_step() -> None:
    """Two tasks of two classes among one of three: as each kind by itself."""
    model = build_model(conv("group"), Categorical(), adapt="head.*")
    algorithm = make_algorithm("softmax")
    meta = algorithm.init(model.adapted, model.shared, generator=generator())
    tasks = episodes()

    def fewer(y: Tensor) -> Tensor:
        return torch.stack([y[0] % 2, y[1], y[2] % 2])

    mixed = Episode(*(part._replace(y=fewer(part.y)) for part in tasks))
    step = HypergradientStep(model, algorithm)
    noise = [algorithm.draw_noise(meta, generator=generator())] * NUM_TASKS
    found = step(meta, mixed, noise)
    alone = [step(meta, tree.map(lambda leaf, i=i: leaf[i : i + 1], mixed), noise[:1]) for i in range(NUM_TASKS)]
    torch.testing.assert_close(found.info.outer_loss, torch.cat([one.info.outer_loss for one in alone]))
    torch.testing.assert_close(found.scores, torch.cat([one.scores for one in alone]))
    total = tree.add(tree.add(alone[0].total, alone[1].total), alone[2].total)
    for one, other in zip(tree.leaves(found.total), tree.leaves(total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_was_learned_with_some_classes_serves_others() -> None:
    tasks = episodes(6, dtype=torch.float32)
    split = [tree.map(lambda leaf, i=index: leaf[i], tasks) for index in range(6)]
    learner = MetaLearner(conv("running", dtype=torch.float32), classes="per_task").fit(split, settings=SETTINGS)
    more = tree.map(lambda leaf: leaf[0], episodes(1, num_classes=7, seed=5, dtype=torch.float32))
    prediction: Any = learner.adapt(*more.support).predict(more.query.x)
    assert prediction.probs.shape == (21, 7)
    assert learner.evaluate([more, split[0]])["accuracy"].mean > 0
    with pytest.raises(ValueError, match="has labels from 0 to 6, but the network has 3 outputs"):
        MetaLearner(conv("group", dtype=torch.float32), "maml").fit(split, settings=SETTINGS).adapt(*more.support)


def test_memory_cannot_be_limited_where_features_are_computed_at_once() -> None:
    model = build_model(conv("group"), Categorical(), adapt="head.*")
    settings = dataclasses.replace(SETTINGS, max_examples_per_pass=4)
    with pytest.raises(ValueError, match="max_examples_per_pass does not apply to heads and to running statistics"):
        Trainer(model, make_algorithm("softmax"), settings)


@pytest.mark.parametrize("norm", ["running", "group"])
def test_features_of_lower_precision_give_nearly_the_same_hypergradient(norm: str) -> None:
    """The body is rounded to eight bits; the head, its solution and all that is stored are not."""
    model = build_model(conv(norm, dtype=torch.float32), Categorical(), adapt="head.*")
    algorithm = make_algorithm("softmax")
    meta = algorithm.init(model.adapted, model.shared, generator=generator())
    tasks = episodes(dtype=torch.float32)
    noise = [algorithm.draw_noise(meta, generator=generator()) for _ in range(NUM_TASKS)]
    exact, rounded = (
        HypergradientStep(model, algorithm, precision=precision)(meta, tasks, noise)
        for precision in ("float32", "bfloat16")
    )
    assert not torch.equal(exact.info.outer_loss, rounded.info.outer_loss)
    assert torch.allclose(exact.info.outer_loss, rounded.info.outer_loss, rtol=2e-2)
    assert rounded.info.inner_grad_norm.max() < 1e-5
    leaves = [torch.cat([leaf.flatten() for leaf in tree.leaves(found.total)]) for found in (exact, rounded)]
    assert torch.cosine_similarity(*leaves, dim=0) > 0.995
    assert {leaf.dtype for leaf in tree.leaves((rounded.total, rounded.moved))} == {torch.float32}


def test_lower_precision_is_for_features_alone() -> None:
    model = build_model(conv("group"), Categorical(), adapt="head.*")
    settings = dataclasses.replace(SETTINGS, precision="bfloat16")
    with pytest.raises(ValueError, match="precision=.bfloat16. is for heads, .* ibaml differentiates the whole"):
        Trainer(model, make_algorithm("ibaml"), settings)
    unknown: Any = "float16"
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16', but is 'float16'"):
        dataclasses.replace(SETTINGS, precision=unknown)
