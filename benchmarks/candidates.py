"""Who takes part: the plain loops, the peers, and the library."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from benchmarks import baseline, peers
from benchmarks.problems import AlgorithmName, MetaStep, Problem
from ibaml import tree
from ibaml.train.step import HypergradientStep

Candidate: TypeAlias = Callable[[Problem], MetaStep]

LIBRARY = "ibaml"
BASELINE = "plain loops (baseline)"
BASELINE_KEEPING_MEMORY = "plain loops, freed memory kept"
KEEPS_MEMORY = (LIBRARY, BASELINE_KEEPING_MEMORY)
"""Who runs with the library's setting of the allocator; the others run with glibc's own."""


def library(problem: Problem, *, fast: bool = True) -> MetaStep:
    """The library; the only place of the benchmark that computes a meta-gradient with it.

    Args:
        problem: The problem.
        fast: False: without anything that a probe in the network would not see every pass of.
    """
    compute = HypergradientStep(problem.model, problem.algorithm, fast=fast)
    episodes = tree.map(lambda *leaves: torch.stack(leaves), *problem.episodes)
    return lambda: tree.leaves(compute(problem.meta, episodes, problem.noises, with_scores=False).total.prior)


def candidates(algorithm: AlgorithmName) -> dict[str, Candidate]:
    """Returns who computes the meta-gradient of an algorithm, by name; the baseline is the first."""

    def loops(problem: Problem) -> MetaStep:
        return partial(baseline.meta_gradient, problem)

    others: dict[str, Candidate] = {}
    if algorithm == "maml":
        others = {
            "higher 0.2.1": peers.higher,
            "iteryne 0.1.0": peers.iteryne,
            "torchopt 0.7.3": peers.torchopt_maml,
            "parallel-metalearn 0.5.6, sequential": partial(peers.parallel_metalearn, backend="sequential"),
            "parallel-metalearn 0.5.6, vmap": partial(peers.parallel_metalearn, backend="vmap"),
        }
    if algorithm == "imaml":
        others = {"torchopt 0.7.3": peers.torchopt_imaml}
    return {BASELINE: loops, BASELINE_KEEPING_MEMORY: loops, **others, LIBRARY: library}
