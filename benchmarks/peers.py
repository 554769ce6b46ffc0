"""The same meta-gradients by libraries that install today, each used the way its documentation shows.

``higher`` 0.2.1, ``iteryne`` 0.1.0 and ``parallel-metalearn`` 0.5.6 unroll (MAML); ``torchopt`` 0.7.3 also
differentiates implicitly (iMAML). None has a distribution over weights. They come with ``pip install 'ibaml[bench]'``
and are imported where they are used, so that one that is missing costs its own line of the table only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems import MetaStep, Problem
from ibaml.types import Tensor


def higher(problem: Problem) -> MetaStep:
    """MAML by ``higher``: a stateful module made functional, and a differentiable copy of an optimiser."""
    import higher as library

    network, algorithm = problem.network, problem.algorithm

    def meta_step() -> list[Tensor]:
        network.zero_grad()
        optimizer = torch.optim.SGD(network.parameters(), lr=algorithm.inner.learning_rate)
        for support, query in problem.episodes:
            with library.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (functional, inner):
                for _ in range(algorithm.inner.num_steps):
                    inner.step(F.cross_entropy(functional(support.x), support.y))
                F.cross_entropy(functional(query.x), query.y).backward()
        return _gradients(network)

    return meta_step


def iteryne(problem: Problem) -> MetaStep:
    """MAML by ``iteryne``: functional calls and one differentiable step at a time."""
    import iteryne as library

    network, algorithm = problem.network, problem.algorithm
    maml = library.MAML(network, inner_lr=algorithm.inner.learning_rate, inner_steps=algorithm.inner.num_steps)

    def meta_step() -> list[Tensor]:
        network.zero_grad()
        for support, query in problem.episodes:
            learner = maml.clone().adapt_on(F.cross_entropy, *support)
            F.cross_entropy(learner(query.x), query.y).backward()
        return _gradients(network)

    return meta_step


def torchopt_maml(problem: Problem) -> MetaStep:
    """MAML by ``torchopt``: a differentiable optimiser that changes a module's own weights, and their recovery."""
    import torchopt as library

    network, algorithm = problem.network, problem.algorithm

    def meta_step() -> list[Tensor]:
        network.zero_grad()
        inner = library.MetaSGD(network, lr=algorithm.inner.learning_rate)
        weights = library.extract_state_dict(network, by="reference")
        state = library.extract_state_dict(inner, by="reference")
        for support, query in problem.episodes:
            for _ in range(algorithm.inner.num_steps):
                inner.step(F.cross_entropy(network(support.x), support.y))
            F.cross_entropy(network(query.x), query.y).backward()
            library.recover_state_dict(network, weights)
            library.recover_state_dict(inner, state)
        return _gradients(network)

    return meta_step


class _LogitsInDict(nn.Module):
    """What ``parallel-metalearn`` expects of a model: outputs in a dict, and flags that a network need not know."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, **flags: object) -> dict[str, object]:
        return {"logits": self.network(x), "buffers": {}}

    def get_fast_weights(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def parallel_metalearn(problem: Problem, backend: str) -> MetaStep:
    """MAML by ``parallel-metalearn``: all tasks under one vmap, or one after the other.

    Its step ends with the outer optimiser; one with a learning rate of zero leaves the weights as they are. Under vmap
    it differentiates from outside: there the statistics that batch normalisation saved for its derivative count as
    constants in torch 2.13, so that second derivatives, and this gradient, are wrong for networks that have it.
    """
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.categorical_accuracy import CategoricalAccuracy
    from metalearn.loss.CEloss import CrossEntropy

    network, algorithm, num_tasks = problem.network, problem.algorithm, len(problem.episodes)
    model = _LogitsInDict(network)
    inner = InnerSGD(model.get_fast_weights(), inner_lr=algorithm.inner.learning_rate, learn_lr=False)
    maml = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner.to(problem.meta_leaves()[0].dtype),
        # Its default for metric_fn is a class, which is then called as if it were an instance.
        support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=algorithm.inner.num_steps,
        chunk_size=num_tasks,
        device=problem.device,
        backend=backend,
    )
    parts = (problem.episodes[0].support._fields, ("support", "query"))
    stacked = {
        (part, field): torch.stack([getattr(getattr(episode, part), field) for episode in problem.episodes])
        for field in parts[0]
        for part in parts[1]
    }
    support_labels, query_labels = {"labels": stacked["support", "y"]}, {"labels": stacked["query", "y"]}
    batch = (stacked["support", "x"], support_labels, stacked["query", "x"], query_labels)

    def meta_step() -> list[Tensor]:
        maml.step(iter([batch]), training=True)
        # Its loss is the mean over tasks.
        return [num_tasks * gradient for gradient in _gradients(network)]

    return meta_step


def torchopt_imaml(problem: Problem) -> MetaStep:
    """Implicit MAML by ``torchopt``: ``custom_root`` around the inner loop, its conjugate gradients behind it."""
    import torchopt as library

    network, algorithm = problem.network, problem.algorithm
    names = [name for name, _ in network.named_parameters()]

    def support_loss(weights: tuple[Tensor, ...], centre: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        distance = sum(((a - b) ** 2).sum() for a, b in zip(weights, centre, strict=True))
        return nll(weights, x, y) + 0.5 * algorithm.proximal_strength * distance

    def nll(weights: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(problem.forward(dict(zip(names, weights, strict=True)), x), y)

    @library.diff.implicit.custom_root(
        torch.func.grad(support_loss, argnums=0),
        argnums=1,
        solve=library.linear_solve.solve_cg(maxiter=algorithm.linear.max_steps, rtol=0.0),
    )
    def solve(weights: tuple[Tensor, ...], centre: tuple[Tensor, ...], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        optimizer = library.sgd(lr=algorithm.inner.learning_rate)
        state = optimizer.init(weights)
        with torch.enable_grad():
            for _ in range(algorithm.inner.num_steps):
                weights = tuple(each.detach().requires_grad_() for each in weights)
                gradients = torch.autograd.grad(support_loss(weights, centre, x, y), weights)
                updates, state = optimizer.update(gradients, state, inplace=False)
                weights = library.apply_updates(weights, updates, inplace=False)
        return weights

    def meta_step() -> list[Tensor]:
        network.zero_grad()
        parameters = tuple(network.parameters())
        start = tuple(parameter.detach() for parameter in parameters)
        for support, query in problem.episodes:
            nll(solve(start, parameters, *support), *query).backward()
        return _gradients(network)

    return meta_step


def _gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.detach() for parameter in network.parameters()]
