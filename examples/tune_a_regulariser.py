"""Tunes one ridge strength per feature by the gradient of a validation loss: forty strengths, far too many for a grid.

`ibaml.implicit_hypergradient` needs two functions and a solution, and knows nothing of meta-learning. It solves one
linear system with the Hessian of the training loss, whose products it takes by automatic differentiation, so the same
lines serve a loss that has no closed form. Seconds on one CPU thread.
"""

import argparse
from functools import partial

import torch

import ibaml
from ibaml.types import Batch

DOUBLE = torch.float64
NUM_RELEVANT, NUM_FEATURES = 5, 40


def make_data(generator: torch.Generator) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test set of a linear model in which five of forty features count."""
    weights = torch.zeros(NUM_FEATURES, dtype=DOUBLE)
    weights[:NUM_RELEVANT] = torch.tensor([2.0, -1.5, 1.0, 1.0, -0.5])

    def draw(num_examples: int) -> Batch:
        x = torch.randn(num_examples, NUM_FEATURES, generator=generator, dtype=DOUBLE)
        return Batch(x, x @ weights + torch.randn(num_examples, generator=generator, dtype=DOUBLE))

    return draw(50), draw(100), draw(2000)


def mean_squared_error(weights: torch.Tensor, batch: Batch) -> torch.Tensor:
    return ((batch.y - batch.x @ weights) ** 2).mean()


def training_loss(weights: torch.Tensor, log_strengths: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Inner loss. Strengths are positive, so their logarithms are what is tuned."""
    return mean_squared_error(weights, batch) + (log_strengths.exp() * weights**2).sum()


def train(log_strengths: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Minimises the training loss, here in closed form; any optimiser that comes close to the minimum would do."""
    gram = batch.x.T @ batch.x / len(batch.y) + torch.diag(log_strengths.exp())
    return torch.linalg.solve(gram, batch.x.T @ batch.y / len(batch.y))


def hypergradient(log_strengths: torch.Tensor, training: Batch, validation: Batch):
    """Gradient of the validation loss of the trained weights in the strengths, with its diagnostics."""
    return ibaml.implicit_hypergradient(
        lambda weights, strengths: training_loss(weights, strengths, training),
        lambda weights, strengths: mean_squared_error(weights, validation),
        train(log_strengths, training),
        log_strengths,
        partial(ibaml.cg, max_steps=NUM_FEATURES, rtol=1e-10),
    )


def finite_differences(log_strengths: torch.Tensor, training: Batch, validation: Batch, step: float = 1e-4):
    """The same by training twice per strength: the check, and the price that the implicit gradient saves."""
    steps = step * torch.eye(len(log_strengths), dtype=DOUBLE)

    def loss(strengths: torch.Tensor) -> torch.Tensor:
        return mean_squared_error(train(strengths, training), validation)

    return torch.stack([(loss(log_strengths + e) - loss(log_strengths - e)) / (2 * step) for e in steps])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam on the strengths")
    num_steps = parser.parse_args(arguments).steps
    training, validation, test = make_data(torch.Generator().manual_seed(0))

    # The fairest start: the best single strength on the validation set, from a grid.
    grid = torch.linspace(-7, 3, 41, dtype=DOUBLE)
    candidates = [value.expand(NUM_FEATURES).clone() for value in grid]
    start = min(candidates, key=lambda c: float(mean_squared_error(train(c, training), validation)))

    (gradient, info), differences = (f(start, training, validation) for f in (hypergradient, finite_differences))
    error = float((gradient - differences).norm() / differences.norm())
    print(f"implicit gradient against finite differences: relative error {error:.1e}")
    print(f"how far to trust it: inner gradient {info.inner_grad_norm:.0e}, linear residual {info.linear_residual:.0e}")

    log_strengths = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([log_strengths], lr=0.1)
    for _ in range(num_steps):
        log_strengths.grad, _ = hypergradient(log_strengths.detach(), training, validation)
        optimizer.step()
    tuned = log_strengths.detach()
    print("\nmean squared error   validation    test      (noise alone: 1)")
    for name, strengths in (("one strength", start), ("one per feature", tuned)):
        losses = [float(mean_squared_error(train(strengths, training), batch)) for batch in (validation, test)]
        print(f"{name:20} {losses[0]:8.3f} {losses[1]:9.3f}")
    relevant, irrelevant = tuned[:NUM_RELEVANT].exp().median(), tuned[NUM_RELEVANT:].exp().median()
    print(f"median strength: {relevant:.2g} for features that count, {irrelevant:.2g} for the others")
    print("The validation error is lower also because it was tuned on: only the test error says what was gained.")


if __name__ == "__main__":
    main()
