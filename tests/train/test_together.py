"""Neighbouring tasks of one shape, predicted at once by heads, are predicted as each by itself."""

import pytest
import torch

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import make_likelihood
from ibaml.networks import MLP
from ibaml.posterior import FittedModel
from ibaml.train import together
from ibaml.train.evaluate import Evaluation, evaluate
from ibaml.types import Batch, Episode, Tensor

HEADS = {"softmax": "categorical", "gaussian_classes": "categorical", "prototypes": "categorical"}
HEADS |= {"linear_gaussian": "gaussian", "gp": "gaussian", "generalized_linear": "gaussian"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def set_up(name: str, sizes: list[int], activation: str = "tanh") -> tuple[FittedModel, list[Episode]]:
    kind = HEADS[name]
    num_outputs = 3 if kind == "categorical" else 1
    network = MLP(
        num_outputs, input_shape=(2,), hidden_sizes=(6,), activation=activation, generator=generator(1)
    ).double()
    algorithm = make_algorithm(name)
    model = build_model(network, make_likelihood(kind, num_outputs), adapt=_last(network))
    meta = algorithm.init(model.adapted, model.shared, generator=generator(2))

    def batch(size: int, seed: int) -> Batch:
        x = torch.randn(size, 2, generator=generator(seed), dtype=torch.float64)
        y = torch.arange(size) % 3 if kind == "categorical" else x.sum(-1, keepdim=True).sin()
        return Batch(x, y)

    tasks = [Episode(batch(size, index), batch(5, 100 + index)) for index, size in enumerate(sizes)]
    fitted = FittedModel(model=model, algorithm=algorithm, meta=meta, preprocessing=None, device=torch.device("cpu"))
    return fitted, tasks


def _last(network: MLP) -> str:
    *_, name = (name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear))
    return f"{name}.*"


def numbers(evaluation: Evaluation) -> list[Tensor]:
    return [value for one in evaluation.predictions for value in one.tensors().values()]


@pytest.mark.parametrize("name", HEADS)
def test_tasks_at_once_are_predicted_as_one_by_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Two shapes, a run of one task, and a run that is longer than what is taken at once.
    fitted, tasks = set_up(name, [6, 6, 9, 6, 6, 6, 6])
    monkeypatch.setattr(together, "_MOST_EXAMPLES", 33)
    asked = [together.Asked(fitted, index, task, 3, None) for index, task in enumerate(tasks)]
    assert [len(group) for group in together.in_groups(asked)] == [2, 1, 3, 1]
    at_once = evaluate(fitted, tasks, seed=0)
    monkeypatch.setattr(together, "_MOST_EXAMPLES", 1)
    assert [len(group) for group in together.in_groups(asked)] == [1] * 7
    alone = evaluate(fitted, tasks, seed=0)
    for found, expected in zip(numbers(at_once), numbers(alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for score, values in alone.per_task.items():
        torch.testing.assert_close(at_once.per_task[score], values, rtol=1e-8, atol=1e-9, equal_nan=True)


def test_a_task_that_is_not_finite_is_named_though_others_share_its_pass() -> None:
    fitted, tasks = set_up("softmax", [6, 6, 6], activation="relu")
    query = tasks[1].query
    tasks[1] = tasks[1]._replace(query=query._replace(x=torch.full_like(query.x, 1e308)))
    with pytest.raises(FloatingPointError, match="test task 1"):
        evaluate(fitted, tasks, seed=0)
