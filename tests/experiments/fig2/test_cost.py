"""Counts against formulas, memory against known sizes."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from ibaml import tree
from ibaml.algorithms.model import Model
from ibaml.experiments.fig2.cost import HypergradientProblem, PassCounter, peak_bytes_of
from ibaml.experiments.fig2.process import build_problem
from ibaml.experiments.fig2.settings import EXPLICIT, AlgorithmName, Fig2Settings

ALGORITHMS: tuple[AlgorithmName, ...] = ("maml", "imaml", "abml", "ibaml")
CPU = torch.device("cpu")
TINY = Fig2Settings(
    inner_steps=(1, 2),
    linear_steps=(3,),
    device="cpu",
    num_channels=4,
    image_size=16,
    num_queries=2,
    num_repeats=2,
    num_threads=1,
)


def problem(
    name: AlgorithmName, num_inner_steps: int, num_linear_steps: int = 3, **changes: Any
) -> tuple[HypergradientProblem, Model]:
    settings = dataclasses.replace(TINY, **changes)
    linear = None if name in EXPLICIT else num_linear_steps
    return build_problem(settings, name, num_inner_steps, linear, dtype=torch.float64)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_watching_changes_no_gradient_and_the_solver_has_no_reason_to_stop_early(
    name: AlgorithmName, num_samples: int
) -> None:
    built, _ = problem(name, 2, num_samples=num_samples)
    expected, info = built.algorithm.hypergradient(built.nll, built.meta, built.episode, built.noise)
    assert float(tree.norm(expected)) > 1e-3
    torch.testing.assert_close(built.hypergradient(), expected, rtol=0, atol=0)
    if name not in EXPLICIT:
        assert not info.linear_converged


def counts(name: AlgorithmName, num_inner_steps: int, num_linear_steps: int, num_samples: int) -> list[int]:
    built, model = problem(name, num_inner_steps, num_linear_steps, num_samples=num_samples)
    counter = PassCounter()
    seen: list[tuple[int, int]] = []
    built._replace(nll=counter.nll(model)).hypergradient(lambda: seen.append((counter.num_gradients, counter.num_hvps)))
    forward, forward_hvps = seen[-1]
    return [forward, forward_hvps, counter.num_gradients - forward, counter.num_hvps]


@pytest.mark.parametrize(("num_inner_steps", "num_linear_steps", "num_samples"), [(1, 2, 1), (3, 1, 2)])
def test_counts_agree_with_the_formulas(num_inner_steps: int, num_linear_steps: int, num_samples: int) -> None:
    k, l, s = num_inner_steps, num_linear_steps, num_samples  # noqa: E741 - as in the paper
    # Forward: K steps and, unrolled, the gradient norm of the result. Backward: the query set and K products, or the
    # query set, the inner gradient and L products. ABML's outer loss looks at the support set as well. For weights the
    # library takes the mixed derivative by one more gradient; the Gaussian form knows it.
    assert counts("maml", k, l, s) == [k + 1, 0, 1, k]
    assert counts("imaml", k, l, s) == [k, 0, 3, l]
    assert counts("abml", k, l, s) == [s * (k + 1), 0, 2 * s, s * k]
    assert counts("ibaml", k, l, s) == [s * k, 0, 2 * s, s * l]


def test_the_probe_changes_neither_values_nor_derivatives() -> None:
    built, model = problem("maml", 1)
    counted = PassCounter().nll(model)

    def losses(nll: Any) -> Any:
        def mean(weights: Any) -> torch.Tensor:
            return nll.per_example(weights, built.meta.shared, built.episode.support).mean()

        prior = built.meta.prior
        gradient, pullback = torch.func.vjp(torch.func.grad(mean), prior)[:2]
        return mean(prior), gradient, pullback(prior)

    torch.testing.assert_close(losses(counted), losses(model), rtol=1e-14, atol=0)


class TestPeakBytes:
    def test_is_the_largest_sum_of_what_is_alive_at_once(self) -> None:
        kept = torch.zeros(1000)

        def function() -> torch.Tensor:
            first = torch.empty(50_000, dtype=torch.uint8)
            second = torch.empty(30_000, dtype=torch.uint8)
            del first
            third = torch.empty(40_000, dtype=torch.uint8)
            del second
            return kept[:10].add_(1) if third is not None else kept

        assert peak_bytes_of(function, CPU) == 80_000

    def test_ignores_what_an_earlier_call_left_behind(self) -> None:
        left: list[torch.Tensor] = []

        def function() -> None:
            left.append(torch.empty(70_000, dtype=torch.uint8))

        assert peak_bytes_of(function, CPU) == 70_000
        assert peak_bytes_of(function, CPU) == 70_000

    def test_of_a_call_that_allocates_nothing(self) -> None:
        assert peak_bytes_of(lambda: None, CPU) == 0

    def test_on_cuda_asks_its_allocator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = torch.device("cuda")
        calls: list[str] = []

        def record(name: str, value: int | None, given: torch.device) -> int | None:
            assert given == device
            calls.append(name)
            return value

        for name, value in [("synchronize", None), ("reset_peak_memory_stats", None)]:
            monkeypatch.setattr(torch.cuda, name, partial(record, name, value))
        monkeypatch.setattr(torch.cuda, "memory_allocated", partial(record, "before", 300))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", partial(record, "peak", 1000))
        assert peak_bytes_of(lambda: calls.append("function"), device) == 700
        assert calls == ["synchronize", "before", "reset_peak_memory_stats", "function", "synchronize", "peak"]


def peak_bytes(name: AlgorithmName, num_inner_steps: int, num_linear_steps: int = 1) -> int:
    built, _ = problem(name, num_inner_steps, num_linear_steps)
    return peak_bytes_of(built.hypergradient, CPU)


@pytest.mark.parametrize("name", EXPLICIT)
def test_peak_memory_of_explicit_algorithms_is_linear_in_the_number_of_inner_steps(name: AlgorithmName) -> None:
    at_1, at_2, at_3 = (peak_bytes(name, num_inner_steps) for num_inner_steps in (1, 2, 3))
    assert at_3 - at_2 == at_2 - at_1 > 0.1 * at_1


@pytest.mark.parametrize("name", ["imaml", "ibaml"])
def test_peak_memory_of_implicit_algorithms_depends_on_no_number_of_steps(name: AlgorithmName) -> None:
    assert peak_bytes(name, 1) == peak_bytes(name, 3) == peak_bytes(name, 1, 2)


@pytest.mark.parametrize("differentiate_outside", [True, False])
def test_passes_are_counted_for_every_member_of_a_batch(differentiate_outside):
    counter = PassCounter()

    def step(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        def loss(weight: torch.Tensor) -> torch.Tensor:
            return (counter.watch(weight * x) ** 3).sum()

        return loss(weight - 0.1 * torch.func.grad(loss)(weight))

    weight, x = torch.ones(()), torch.rand(4, 3)
    if differentiate_outside:
        torch.func.grad(lambda weight: torch.func.vmap(step, in_dims=(None, 0))(weight, x).sum())(weight)
    else:
        torch.func.vmap(torch.func.grad(step), in_dims=(None, 0))(weight, x)
    # For each of the four: the inner and the outer gradient, and one product to go back through the step.
    assert (counter.num_gradients, counter.num_hvps) == (4 * 2, 4 * 1)
