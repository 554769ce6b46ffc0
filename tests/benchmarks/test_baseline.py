"""The plain loops of the benchmark compute the library's gradients: otherwise their times could not be compared."""

import dataclasses

import pytest
import torch

from benchmarks import baseline
from benchmarks.problems import Case, build_problem, library_gradient

CASES = {
    "maml": Case(network="tiny", algorithm="maml", num_inner_steps=3),
    "imaml": Case(network="tiny", algorithm="imaml", num_inner_steps=3, num_linear_steps=4),
    "abml": Case(network="tiny", algorithm="abml", num_inner_steps=3),
    "ibaml": Case(network="tiny", algorithm="ibaml", num_inner_steps=3, num_linear_steps=4),
}


@pytest.mark.parametrize("num_shots", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_baseline_computes_the_librarys_gradient(name, num_shots):
    case = dataclasses.replace(CASES[name], num_shots=num_shots, num_queries=2)
    problem = build_problem(case, dtype=torch.float64)
    ours, loops = library_gradient(problem), baseline.meta_gradient(problem)
    assert [each.shape for each in ours] == [each.shape for each in loops]
    for a, b in zip(ours, loops, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(torch.cat([x.flatten() for x in ours]).norm()))
