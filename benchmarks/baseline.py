"""The BASELINE of the benchmark: meta-gradients the way research code writes them, one plain loop inside another.

A Python loop over tasks and over weight samples; ``torch.autograd.grad`` with retained graphs; Hessian-vector products
by differentiating the gradient once more in reverse. No vmap, no fused updates, no chosen memory layout. The equations
are those of the library (docs/design.md), so that both do the same work on the same tensors.
"""

import torch
import torch.nn.functional as F
from torch.autograd import grad

from benchmarks.problems import Problem


def meta_gradient(problem: Problem) -> list[torch.Tensor]:
    """Returns the gradients of all tasks, summed, in the order of ``problem.meta_leaves()``."""
    one_task = {"maml": _maml, "imaml": _imaml, "abml": _abml, "ibaml": _ibaml}[problem.algorithm.name]
    total = None
    for episode, noise in zip(problem.episodes, problem.noises, strict=True):
        gradients = one_task(problem, episode, noise)
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    return total


def _nll(problem, names, weights, batch):
    return F.cross_entropy(problem.forward(dict(zip(names, weights, strict=True)), batch.x), batch.y)


def _expected_nll(problem, names, mean, log_var, noise, batch):
    loss = 0.0
    for s in range(problem.algorithm.num_samples):
        weights = [m + (0.5 * r).exp() * noise[n][s] for n, m, r in zip(names, mean, log_var, strict=True)]
        loss = loss + _nll(problem, names, weights, batch)
    return loss / problem.algorithm.num_samples


def _kl(mean, log_var, prior_mean, prior_log_var):
    terms = zip(mean, log_var, prior_mean, prior_log_var, strict=True)
    return sum(0.5 * ((r - R).exp() - 1 - (r - R) + (m - M) ** 2 * (-R).exp()).sum() for m, r, M, R in terms)


def _leaves(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _maml(problem, episode, noise):
    names, algorithm = list(problem.meta.prior), problem.algorithm
    initial = _leaves(problem.meta.prior.values())
    weights = initial
    for _ in range(algorithm.inner.num_steps):
        gradients = grad(_nll(problem, names, weights, episode.support), weights, create_graph=True)
        weights = [w - algorithm.inner.learning_rate * g for w, g in zip(weights, gradients, strict=True)]
    return list(grad(_nll(problem, names, weights, episode.query), initial))


def _imaml(problem, episode, noise):
    names, algorithm, strength = list(problem.meta.prior), problem.algorithm, problem.algorithm.proximal_strength
    initial = list(problem.meta.prior.values())
    weights = _leaves(initial)
    for _ in range(algorithm.inner.num_steps):
        gradients = grad(_nll(problem, names, weights, episode.support), weights)
        steps = [g + strength * (w - i) for g, w, i in zip(gradients, weights, initial, strict=True)]
        weights = _leaves(w - algorithm.inner.learning_rate * s for w, s in zip(weights, steps, strict=True))
    rhs = grad(_nll(problem, names, weights, episode.query), weights)
    gradients = grad(_nll(problem, names, weights, episode.support), weights, create_graph=True)

    def matvec(vector):
        products = grad(gradients, weights, grad_outputs=vector, retain_graph=True)
        return [h + strength * v for h, v in zip(products, vector, strict=True)]

    return [strength * u for u in _conjugate_gradients(matvec, rhs, algorithm.linear.max_steps)]


def _abml(problem, episode, noise):
    names, algorithm = list(problem.meta.prior.mean), problem.algorithm
    mean, log_var = _leaves(problem.meta.prior.mean.values()), _leaves(problem.meta.prior.log_var.values())
    m, r, n = mean, log_var, len(names)
    num_support, num_all = len(episode.support.y), len(episode.support.y) + len(episode.query.y)
    for _ in range(algorithm.inner.num_steps):
        loss = _expected_nll(problem, names, m, r, noise.inner, episode.support)
        loss = loss + algorithm.temperature / num_support * _kl(m, r, mean, log_var)
        gradients = grad(loss, [*m, *r], create_graph=True)
        m = [a - algorithm.inner.learning_rate * g for a, g in zip(m, gradients[:n], strict=True)]
        r = [a - algorithm.inner.learning_rate * g for a, g in zip(r, gradients[n:], strict=True)]
    query_nll = _expected_nll(problem, names, m, r, noise.outer, episode.query)
    support_nll = _expected_nll(problem, names, m, r, noise.inner, episode.support)
    loss = (num_support * support_nll + (num_all - num_support) * query_nll) / num_all
    loss = loss + algorithm.temperature / num_all * _kl(m, r, mean, log_var)
    return list(grad(loss, [*mean, *log_var]))


def _ibaml(problem, episode, noise):
    names, algorithm = list(problem.meta.prior.mean), problem.algorithm
    mean, log_var = list(problem.meta.prior.mean.values()), list(problem.meta.prior.log_var.values())
    m, r, n, lam = _leaves(mean), _leaves(log_var), len(names), algorithm.temperature / len(episode.support.y)
    for _ in range(algorithm.inner.num_steps):
        loss = _expected_nll(problem, names, m, r, noise.inner, episode.support) + lam * _kl(m, r, mean, log_var)
        gradients = grad(loss, [*m, *r])
        m = _leaves(a - algorithm.inner.learning_rate * g for a, g in zip(m, gradients[:n], strict=True))
        r = _leaves(a - algorithm.inner.learning_rate * g for a, g in zip(r, gradients[n:], strict=True))
    rhs = grad(_expected_nll(problem, names, m, r, noise.outer, episode.query), [*m, *r])
    gradients = grad(_expected_nll(problem, names, m, r, noise.inner, episode.support), [*m, *r], create_graph=True)
    fixed = [g.detach() for g in gradients]
    ratio = [(a.detach() - b).exp() for a, b in zip(r, log_var, strict=True)]
    diagonal = [lam * (-b).exp() for b in log_var]
    diagonal += [0.5 * lam * (q + 2 / lam * g) ** 2 - g for q, g in zip(ratio, fixed[n:], strict=True)]

    def matvec(vector):
        products = grad(gradients, [*m, *r], grad_outputs=vector, retain_graph=True)
        return [h + a * v for h, a, v in zip(products, diagonal, vector, strict=True)]

    scale = [a.detach().exp() / lam for a in r] + [2 / lam] * n
    u = _conjugate_gradients(matvec, rhs, algorithm.linear.max_steps, scale)
    by_mean = [lam * (-b).exp() * v for b, v in zip(log_var, u[:n], strict=True)]
    by_log_var = [0.5 * lam * q * s - g * v for q, s, g, v in zip(ratio, u[n:], fixed[:n], u[:n], strict=True)]
    return by_mean + by_log_var


def _conjugate_gradients(matvec, rhs, num_steps, scale=None):
    scale = [1.0] * len(rhs) if scale is None else scale
    x, residual = [torch.zeros_like(b) for b in rhs], list(rhs)
    direction = [p * r for p, r in zip(scale, residual, strict=True)]
    descent = _dot(residual, direction)
    for _ in range(num_steps):
        product = matvec(direction)
        step = descent / _dot(direction, product)
        x = [a + step * d for a, d in zip(x, direction, strict=True)]
        residual = [r - step * h for r, h in zip(residual, product, strict=True)]
        scaled = [p * r for p, r in zip(scale, residual, strict=True)]
        descent, previous = _dot(residual, scaled), descent
        direction = [s + descent / previous * d for s, d in zip(scaled, direction, strict=True)]
    return x


def _dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
