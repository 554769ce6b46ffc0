"""The plain loops of the benchmark compute the library's gradients: otherwise their times could not be compared."""

import dataclasses

import pytest
import torch
from benchmarks.candidates import BASELINE, LIBRARY, candidates, library
from benchmarks.counting import counted_passes, gradient_equivalents, needed_work
from benchmarks.problems import Case, build_problem

CASES = {
    "maml": Case(network="tiny", algorithm="maml", num_inner_steps=3),
    "imaml": Case(network="tiny", algorithm="imaml", num_inner_steps=3, num_linear_steps=4),
    "abml": Case(network="tiny", algorithm="abml", num_inner_steps=3),
    "ibaml": Case(network="tiny", algorithm="ibaml", num_inner_steps=3, num_linear_steps=4),
}


# Both numbers of shots with an unrolled and with an implicit gradient, of a point and of a distribution.
@pytest.mark.parametrize(("name", "num_shots"), [("maml", 1), ("imaml", 5), ("abml", 5), ("ibaml", 1)])
def test_baseline_computes_the_librarys_gradient(name, num_shots):
    case = dataclasses.replace(CASES[name], num_shots=num_shots, num_queries=2)
    problem = build_problem(case, dtype=torch.float64)
    entrants = candidates(name)
    ours, loops = entrants[LIBRARY](problem)(), entrants[BASELINE](problem)()
    scale = float(torch.cat([each.flatten() for each in ours]).norm())
    assert [each.shape for each in ours] == [each.shape for each in problem.meta_leaves()]
    for a, b in zip(ours, loops, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("name", CASES)
def test_baseline_does_the_needed_work_and_no_more(name):
    problem = build_problem(CASES[name])
    with counted_passes(problem.network) as counter:
        candidates(name)[BASELINE](problem)()
    work = needed_work(CASES[name])
    num_tasks = CASES[name].num_tasks
    assert (counter.num_gradients, counter.num_hvps) == (num_tasks * work.num_gradients, num_tasks * work.hvps)


@pytest.mark.parametrize("name", CASES)
def test_library_takes_every_linear_step(name):
    problem = build_problem(CASES[name])
    with counted_passes(problem.network) as counter:
        library(problem, fast=False)()
    assert counter.num_hvps == CASES[name].num_tasks * needed_work(CASES[name]).hvps
    assert type(problem.network).__name__ == "Conv4"


def test_gradient_equivalents_by_hand():
    # 5-way 1-shot with 15 queries a class: the query set is 15 support sets.
    assert gradient_equivalents(CASES["maml"]) == 3 + 15 + 2 * 3
    assert gradient_equivalents(CASES["imaml"]) == 3 + 1 + 15 + 2 * 4
    # Two weight samples.
    assert gradient_equivalents(CASES["abml"]) == 2 * (3 + 1 + 15 + 2 * 3)
    assert gradient_equivalents(dataclasses.replace(CASES["ibaml"], num_shots=5)) == 2 * (3 + 1 + 3 + 2 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "vgg"}, "network must be one of mlp, .*, but is 'vgg'"),
        ({"algorithm": "sgd"}, "algorithm must be one of maml, .*, but is 'sgd'"),
        ({"num_shots": 0}, "num_shots must be at least 1, but is 0"),
        ({"num_ways": 1}, "num_ways must be at least 2, but is 1"),
        ({"num_linear_steps": 5}, "num_linear_steps belongs to imaml and ibaml, and they need it, but is 5 for maml"),
    ],
)
def test_cases_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASES["maml"], **changes)
