"""An image that comes in several tasks of an evaluation passes through the network once, and nothing else changes."""

import pytest
import torch
from tests.train.trainings import image_tasks
from torch import nn

from ibaml import MetaLearner, tree
from ibaml.data import Augmentation
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.train import TrainerSettings
from ibaml.train.evaluate import draw_task, evaluate
from ibaml.train.images_once import images_once

NUM_TASKS = 12


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 2), norm, nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))


def fitted(norm: nn.Module | None = None, *, algorithm: str = "softmax", adapt: str = "4.*") -> FittedModel:
    learner = MetaLearner(network(norm or nn.BatchNorm2d(4)), algorithm=algorithm, adapt=adapt)
    settings = TrainerSettings(num_steps=3, tasks_per_step=2, fast=False)
    return learner.fit(image_tasks(0), settings=settings).fitted_model


def passed(model: FittedModel) -> list[int]:
    """Numbers of images of the passes through the first layer from now on."""
    sizes: list[int] = []
    model.model.network[0].register_forward_hook(lambda layer, inputs, output: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("algorithm", ["softmax", "prototypes", "maml"])
def test_an_image_passes_once_and_scores_are_those_of_the_tasks_one_by_one(algorithm) -> None:
    model, tasks = fitted(algorithm=algorithm), image_tasks(1)
    one_by_one = [draw_task(tasks, index, seed=3) for index in range(NUM_TASKS)]
    expected = evaluate(model, one_by_one, seed=3)
    sizes = passed(model)
    found = evaluate(model, tasks, num_tasks=NUM_TASKS, seed=3)
    drawn = [tasks.sample_positions(1, generator=task_generator(3, index)) for index in range(NUM_TASKS)]
    different = torch.cat([leaf.flatten() for one in drawn for leaf in (one.support.x, one.query.x)]).unique()
    # The first task's two parts were looked at to check that the network takes them, and an image for its features.
    of_checks = len(one_by_one[0].support.y) + len(one_by_one[0].query.y) + 1
    assert sum(sizes) <= len(different) + 2 * of_checks < NUM_TASKS * 10
    for name, values in expected.per_task.items():
        torch.testing.assert_close(found.per_task[name], values, atol=1e-5, rtol=1e-5)
    assert found.num_support == expected.num_support


def test_foreign_images_are_the_same_ones() -> None:
    model, tasks = fitted(), image_tasks(1)

    class OfImages:
        sample, sample_classes = staticmethod(tasks.sample), staticmethod(tasks.sample_classes)

    found, expected = (
        evaluate(model, each, num_tasks=NUM_TASKS, seed=3, out_of_task=True).per_task["out_of_task_auroc"]
        for each in (tasks, OfImages())
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_positions_are_those_of_the_images_that_are_drawn() -> None:
    tasks = image_tasks(1)
    positions, images = (
        draw(3, generator=torch.Generator().manual_seed(5)) for draw in (tasks.sample_positions, tasks.sample)
    )
    for of_positions, of_images in zip(positions, images, strict=True):
        assert torch.equal(tasks.inputs_at(of_positions.x), of_images.x)
        assert torch.equal(of_positions.y, of_images.y)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (lambda: fitted(nn.BatchNorm2d(4, track_running_stats=False)), {}),
        (lambda: fitted(nn.GroupNorm(2, 4), algorithm="maml", adapt="*"), {}),
        (fitted, {"augmentation": Augmentation(flip=True)}),
    ],
    ids=["features depend on the task", "all layers adapt", "images change at every draw"],
)
def test_tasks_are_taken_as_they_are_where_that_would_change_them(model, changes) -> None:
    tasks = image_tasks(1)
    tasks.__dict__.update(changes)
    model = model()
    x = tree.map(lambda leaf: leaf[0], tasks.sample(1, generator=torch.Generator())).query.x
    assert images_once(model, tasks, x) == (model, tasks)
    assert evaluate(model, tasks, num_tasks=2, seed=0).report["accuracy"].mean >= 0
