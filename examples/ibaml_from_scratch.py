"""Implicit Bayesian meta-learning in one file, with torch alone: nothing is imported from ibaml.

A network shall learn sinusoids from ten points each. All tasks share a prior N(m, diag D) over its weights; for each
task gradient descent turns the prior into a posterior N(m_t, diag d_t), and the prior learns from how well that
predicts. The gradient for the prior does not go back through the descent: it comes from the implicit function theorem
(Zhang et al. 2023), so its memory does not grow with the number of steps. A minute on one CPU thread.

The library's default goes one step further: only the last layer is a task's own, and is solved exactly. Two such heads
are at the end, `linear_gaussian` and `softmax`, for features that the layers below have computed.

A distribution over d weights is a [2, d] tensor of means and log-variances: logarithms, because descent on a variance
itself would sooner or later make it negative, and because weights may have variances as small as exp(-10).
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch.func import grad, grad_and_value, hessian, jvp, vmap


class Settings(NamedTuple):
    """All that is chosen rather than learned."""

    sizes: tuple[int, ...] = (1, 40, 40, 1)  # layers of the perceptron; (1, 1) is a linear model
    noise_variance: float = 0.3**2  # of an observation, known
    num_inner_steps: int = 20  # K
    inner_rate: float = 0.002
    momentum: float = 0.8
    num_linear_steps: int = 5  # L
    temperature: float = 0.05  # 1 is Bayes' rule; below 1 the data count for more than the prior


def network(weights, x, sizes):
    for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        matrix, bias, weights = weights.tensor_split((fan_in * fan_out, (fan_in + 1) * fan_out))
        x = (torch.tanh(x) if layer else x) @ matrix.reshape(fan_out, fan_in).T + bias
    return x


def expected_nll(q, noise, batch, settings):
    """L(q) = E_q[-log p(y | f(x))], estimated with the weights m_t + sqrt(d_t) * noise; mean over the examples."""
    # The noise stays the same during adaptation, which makes L a function that has a gradient and a Hessian.
    (x, y), variance = batch, settings.noise_variance
    outputs = vmap(lambda draw: network(q[0] + torch.exp(q[1] / 2) * draw, x, settings.sizes))(noise)
    return 0.5 * ((y - outputs) ** 2 / variance + math.log(2 * math.pi * variance)).mean()


def kl(q, p):
    """KL(q || p) = 1/2 sum( d_t/D - 1 - log(d_t/D) + (m_t - m)^2 / D )."""
    log_ratio = q[1] - p[1]
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (q[0] - p[0]) ** 2 / p[1].exp()).sum()


def adapt(prior, support, noise, settings):
    """Inner problem: q = argmin F(q), F = L + lam KL(q || prior), by gradient descent with momentum from the prior."""
    # With lam = 1/N this is the negative ELBO over the number N of examples; a temperature scales lam.
    lam = settings.temperature / len(support[1])
    slope = grad(lambda q: expected_nll(q, noise, support, settings) + lam * kl(q, prior))
    q, velocity = prior, torch.zeros_like(prior)
    for _ in range(settings.num_inner_steps):
        velocity = settings.momentum * velocity + slope(q)
        q = q - settings.inner_rate * velocity
    return q


def conjugate_gradients(matvec, rhs, preconditioner, num_steps):
    """Solves A u = rhs for symmetric positive definite A without forming it; returns u and its relative residual."""
    # Far from a minimum A may be indefinite: a direction with p A p <= 0 ends the iteration, which keeps what it has.
    u, residual, direction = torch.zeros_like(rhs), rhs, preconditioner * rhs
    energy, alive = (residual * direction).sum(), True
    for _ in range(num_steps):
        product = matvec(direction)
        curvature = (direction * product).sum()
        alive = alive & (curvature > 0)
        step = torch.where(alive, energy / curvature, 0.0)
        u, residual = u + step * direction, residual - step * product
        previous, energy = energy, (residual * preconditioner * residual).sum()
        direction = preconditioner * residual + energy / previous * direction
    return u, residual.norm() / rhs.norm()


def hypergradient(prior, support, query, noise_in, noise_out, settings):
    """Gradient in the prior of the outer loss O(q), the query's expected nll at the adapted q; also O and the residual.

    While the prior moves, dF/dq stays zero. Hence H dq = -(d2F/dq dprior) dprior with H = d2F/dq2, and
    dO/dprior = -(d2F/dprior dq) u with H u = dO/dq. All derivatives of the KL are known. Where F is stationary,
    lam (m_t - m)/D = -dL/dm_t and 1/d_t = 1/D + (2/lam) dL/dd_t; inserting both gives Lemma 1 of the paper, and
    u_d = d_t s together with d_t dL/dd_t = dL/dlog d_t its form in log-variances:

        H' = hess L - diag(0, dL/dlog d_t) + diag( lam/D, (lam/2) (d_t/D + (2/lam) dL/dlog d_t)^2 )
        H' (u_m, s) = (dO/dm_t, dO/dlog d_t)
        g_m = lam u_m / D          g_logD = -(dL/dm_t) u_m + (lam/2) (d_t/D) s
    """
    q, lam = adapt(prior, support, noise_in, settings), settings.temperature / len(support[1])
    rhs, outer_loss = grad_and_value(expected_nll)(q, noise_out, query, settings)
    nll_gradient = grad(lambda q: expected_nll(q, noise_in, support, settings))
    slope, ratio, precision = nll_gradient(q), torch.exp(q[1] - prior[1]), torch.exp(-prior[1])
    diagonal = torch.stack([lam * precision, lam / 2 * (ratio + 2 / lam * slope[1]) ** 2 - slope[1]])
    # Where F is stationary the diagonal of H' is about (lam/d_t, lam/2): its inverse is a preconditioner for free.
    free = torch.stack([torch.exp(q[1]) / lam, torch.full_like(ratio, 2 / lam)])
    matvec = lambda u: jvp(nll_gradient, (q,), (u,))[1] + diagonal * u  # noqa: E731
    u, residual = conjugate_gradients(matvec, rhs, free, settings.num_linear_steps)
    gradient = torch.stack([lam * precision * u[0], -slope[0] * u[0] + lam / 2 * ratio * u[1]])
    return gradient, outer_loss, residual


def sample_tasks(num_tasks, generator, noise_std=0.3):
    """Sinusoids of random amplitude and phase: ten support points and ten query points each."""
    x = 10 * torch.rand(num_tasks, 20, 1, generator=generator) - 5
    amplitude, phase = torch.rand(2, num_tasks, 1, 1, generator=generator)
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase) + noise_std * torch.randn(x.shape, generator=generator)
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def evaluate(prior, settings, num_tasks=200, num_samples=30):
    """Query nll of the averaged density, and the share of targets in their central 90% interval, over new tasks."""
    generator = torch.Generator().manual_seed(1)
    support, query = sample_tasks(num_tasks, generator)
    noise = torch.randn(num_tasks, num_samples, prior.shape[1], generator=generator)
    q = vmap(lambda *task: adapt(prior, *task, settings))(support, noise[:, :1])
    weights = q[:, :1] + torch.exp(q[:, 1:] / 2) * noise
    f = vmap(lambda w, x: vmap(lambda w: network(w, x, settings.sizes))(w))(weights, query[0])
    density, y = torch.distributions.Normal(f, settings.noise_variance**0.5), query[1].unsqueeze(1)
    inside = (density.cdf(y).mean(1) - 0.5).abs() < 0.45
    return (math.log(num_samples) - density.log_prob(y).logsumexp(1).mean()).item(), inside.float().mean().item()


# Heads: a task's own weights w on features z, [examples, features]; the prior is [2, ...], means and log-variances.


def linear_gaussian(prior, log_noise, z, y):
    """Posterior N(mu, S) of the weights of y = z w + noise: S = (Z'Z/s2 + 1/D)^-1, mu = S (m/D + Z'y/s2)."""
    precision = z.T @ z / log_noise.exp() + torch.diag(torch.exp(-prior[1]))
    covariance = torch.linalg.inv(precision)
    return covariance @ (prior[0] * torch.exp(-prior[1]) + z.T @ y / log_noise.exp()), covariance


def linear_gaussian_loss(prior, log_noise, support, query):
    """Minus the log predictive density of the query, mean over examples: y ~ N(z mu, z S z' + s2)."""
    # The solution is a formula, so that automatic differentiation gives its exact derivative.
    (mean, covariance), (z, y) = linear_gaussian(prior, log_noise, *support), query
    variance = ((z @ covariance) * z).sum(-1) + log_noise.exp()
    return 0.5 * ((y - z @ mean) ** 2 / variance + torch.log(2 * math.pi * variance)).mean()


def softmax_inner_loss(w, prior, z, labels):
    """Inner loss of weights [classes, features]: summed cross entropy + 1/2 |w - m|^2 / D, strictly convex."""
    nll = torch.nn.functional.cross_entropy(z @ w.T, labels, reduction="sum")
    return nll + 0.5 * ((w - prior[0]) ** 2 * torch.exp(-prior[1])).sum()


def softmax(prior, z, labels, num_steps=30):
    """Mode of the posterior by Newton's method, each step halved until the loss falls; and the Hessian there."""
    loss = lambda flat: softmax_inner_loss(flat.view_as(prior[0]), prior, z, labels)  # noqa: E731
    w = prior[0].flatten()
    for _ in range(num_steps):
        step = torch.linalg.solve(hessian(loss)(w), grad(loss)(w))
        while loss(w - step) > loss(w) and step.norm() > 1e-14 * w.norm():
            step = step / 2
        w = w - step
    return w.view_as(prior[0]), hessian(loss)(w)


def softmax_hypergradient(prior, support, query):
    """Gradient in the prior of the query's cross entropy at the mode: -(d2F/dprior dw) u with H u = dO/dw; and O."""
    # The same theorem as above. H is exact, and so is w: no other error than rounding is left.
    w, matrix = softmax(prior, *support)
    outer, outer_loss = grad_and_value(lambda w: torch.nn.functional.cross_entropy(query[0] @ w.T, query[1]))(w)
    u = torch.linalg.solve(matrix, outer.flatten()).view_as(w)
    inner_gradient = lambda prior: grad(softmax_inner_loss)(w, prior, *support)  # noqa: E731
    return -grad(lambda prior: (inner_gradient(prior) * u).sum())(prior), outer_loss


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    num_steps, settings = parser.parse_args(arguments).steps, Settings()
    generator = torch.Generator().manual_seed(0)
    layers = zip(settings.sizes[:-1], settings.sizes[1:], strict=True)
    mean = [torch.randn(o * (i + 1), generator=generator) / math.sqrt(i + 1) for i, o in layers]
    prior = torch.stack([torch.cat(mean), torch.full((sum(map(len, mean)),), -8.5)]).requires_grad_()
    optimizer = torch.optim.Adam([prior], lr=3e-3)
    print("before: nll {:.2f} nats, 90% intervals hold {:.0%}".format(*evaluate(prior.detach(), settings)))
    for step in range(num_steps):
        support, query = sample_tasks(16, generator)
        noise = torch.randn(2, 16, 1, prior.shape[1], generator=generator)
        per_task = vmap(lambda *task: hypergradient(prior.detach(), *task, settings))(support, query, *noise)
        prior.grad, loss, residual = (value.mean(0) for value in per_task)
        torch.nn.utils.clip_grad_norm_([prior], 10.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: outer loss {loss:.2f}, linear residual {residual:.2g}", flush=True)
    print("after:  nll {:.2f} nats, 90% intervals hold {:.0%}".format(*evaluate(prior.detach(), settings)))


if __name__ == "__main__":
    main()
