"""Newton matrices of many classes or examples: summed in parts, and refused before they are made."""

import pytest
import torch

from ibaml.algorithms.heads import class_problems, newton, room
from ibaml.types import Tensor

DOUBLE = torch.float64


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def by_hand(logits: Tensor, features: Tensor) -> Tensor:
    """``I`` and the Hessian of the summed nll of class 0 in the weights of all classes."""

    def nll(weights: Tensor) -> Tensor:
        outputs = logits + torch.einsum("kr,knr->kn", weights, features.expand(len(logits), -1, -1))
        return -torch.log_softmax(outputs, 0)[0].sum()

    start = torch.zeros(len(logits), features.shape[-1], dtype=DOUBLE)
    size = start.numel()
    return torch.eye(size, dtype=DOUBLE) + torch.func.hessian(nll)(start).reshape(size, size)


@pytest.mark.parametrize("num_priors", [1, 3])
@pytest.mark.parametrize("at_once", [1, 40, 2**24], ids=["one by one", "some", "all"])
def test_parts_of_the_examples_add_up(monkeypatch: pytest.MonkeyPatch, num_priors: int, at_once: int) -> None:
    monkeypatch.setattr(class_problems, "_MOST_AT_ONCE", at_once)
    logits, features = draw(3, 50, seed=0), draw(num_priors, 50, 4, seed=1)
    problem = class_problems.problem_of(features, 3)
    expected = by_hand(logits, features)
    factor = problem.factorize(torch.log_softmax(logits, 0))[0]
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-12, atol=1e-12)
    determinant = problem.log_determinant(torch.log_softmax(logits, 0))
    torch.testing.assert_close(determinant, torch.linalg.slogdet(expected).logabsdet, rtol=1e-12, atol=0)
    # With derivatives, and for several tasks at once.
    slopes = torch.func.vmap(torch.func.grad(lambda one: problem.log_determinant(torch.log_softmax(one, 0))))(
        torch.stack([logits, 2 * logits])
    )
    wanted = torch.func.grad(lambda one: torch.linalg.slogdet(by_hand(one, features)).logabsdet)
    torch.testing.assert_close(slopes, torch.stack([wanted(logits), wanted(2 * logits)]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("num_classes", "num_examples", "num_features", "needs"),
    [(1_000, 5_000, 17, "1,000 classes and 5,000 examples takes about 7 GB"), (50, 2_000, 2_000, "about 5 GB")],
    ids=["weights", "examples"],
)
def test_what_the_machine_cannot_hold_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, num_examples: int, num_features: int, needs: str
) -> None:
    """On Linux a process that asks for more may be ended without a word."""
    features = torch.zeros((), dtype=DOUBLE).expand(1, num_examples, num_features)
    monkeypatch.setattr(room, "_memory", lambda: 10**9)
    with pytest.raises(MemoryError, match=f"softmax over .*{needs}, and this machine has 1: algorithm='gaussian_class"):
        class_problems.problem_of(features, num_classes)
    class_problems.problem_of(features[:, :100, :10], 20)
    # Another device says so itself, and a system need not tell how much there is.
    class_problems.problem_of(features[..., :17].to("meta"), 1_000)
    monkeypatch.setattr(room, "_memory", lambda: None)
    class_problems.problem_of(features[:, :5_000, :2], num_classes)


def test_the_memory_of_this_machine_is_known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.os, "sysconf", {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__, raising=False)
    assert room._memory() == 12288
    monkeypatch.delattr(room.os, "sysconf")
    assert room._memory() is None


@pytest.mark.parametrize("num_priors", [1, 4])
@pytest.mark.parametrize("num_examples", [8, 60], ids=["examples", "weights"])
def test_steps_with_an_old_matrix_lead_to_the_same_solution(num_priors: int, num_examples: int) -> None:
    problem = class_problems.problem_of(3 * draw(num_priors, num_examples, 3, seed=0), 4)
    targets = torch.nn.functional.one_hot(torch.arange(num_examples) % 4, 4).mT.double()
    offset, loss = draw(4, num_examples, seed=1), class_problems.CrossEntropy()

    def solved(steps_per_matrix: int, start: Tensor | None = None) -> Tensor:
        how = {"max_steps": 30, "tolerance": 1e-10, "steps_per_matrix": steps_per_matrix, "start": start}
        unknown, residual, *_ = newton.newton(problem, loss, offset, targets, **how)
        assert residual < 1e-12
        return unknown

    expected = solved(1)
    for steps_per_matrix in (2, 3):
        torch.testing.assert_close(solved(steps_per_matrix), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(solved(3, torch.zeros_like(expected)), expected, rtol=1e-10, atol=1e-10)
