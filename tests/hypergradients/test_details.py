"""What implicit hypergradients take beside the two losses, and what they hand back beside the gradient."""

import pytest
import torch

from ibaml import DiagonalGaussian, dense, gaussian_implicit_hypergradient, implicit_hypergradient, tree
from ibaml.hypergradients import unrolled_hypergradient
from ibaml.solvers.inner import GradientDescent
from ibaml.types import Tensor

DOUBLE = torch.float64


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


X, Y = draw(9, 3, seed=0), draw(9, seed=1)
POSTERIOR = DiagonalGaussian({"w": draw(3, seed=2)}, {"w": 0.3 * draw(3, seed=3) - 1})
PRIOR = DiagonalGaussian({"w": draw(3, seed=4)}, {"w": 0.3 * draw(3, seed=5)})


def expected_nll(q: DiagonalGaussian) -> Tensor:
    squares = ((Y - X @ q.mean["w"]) ** 2).sum() + ((X**2).sum(0) * q.log_var["w"].exp()).sum()
    return 0.5 * squares / len(Y)


def outer(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    return (q.mean["w"] ** 3).sum() + (q.log_var["w"] * p.mean["w"]).sum() + (p.log_var["w"] ** 2).sum()


def test_a_multiple_of_the_inner_nll_is_as_if_it_stood_in_the_outer_loss() -> None:
    written_out = lambda q, p: outer(q, p) + 0.7 * expected_nll(q)  # noqa: E731
    expected, told = gaussian_implicit_hypergradient(expected_nll, written_out, POSTERIOR, PRIOR, 0.2, dense)
    found, info = gaussian_implicit_hypergradient(
        expected_nll, outer, POSTERIOR, PRIOR, 0.2, dense, outer_nll_weight=0.7
    )
    torch.testing.assert_close(info.outer_loss, told.outer_loss, rtol=1e-13, atol=0)
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    without, _ = gaussian_implicit_hypergradient(expected_nll, outer, POSTERIOR, PRIOR, 0.2, dense)
    assert (without.mean["w"] - found.mean["w"]).abs().min() > 1e-3, "the term made no difference"


def test_it_is_refused_beside_shared_parameters() -> None:
    message = "outer_nll_weight is 0.7, but there are shared parameters, whose gradient would lack that term"
    with pytest.raises(ValueError, match=message):
        gaussian_implicit_hypergradient(
            lambda q, s: s["a"] * expected_nll(q),
            lambda q, p, s: outer(q, p),
            POSTERIOR,
            PRIOR,
            0.2,
            dense,
            shared={"a": torch.ones((), dtype=DOUBLE)},
            outer_nll_weight=0.7,
        )


def test_what_is_handed_back_holds_no_graph() -> None:
    """Else each task's inner run would be kept for as long as its diagnostics."""
    meta, inner = torch.ones(3, dtype=DOUBLE), draw(3, seed=6).requires_grad_()
    found = implicit_hypergradient(
        lambda v, theta: ((v - theta) ** 2).sum(), lambda v, theta: v.sum(), inner, meta, dense
    )
    assert not found[1].inner_params.requires_grad
    solver = GradientDescent(num_steps=3, learning_rate=0.1)
    gradient, info = unrolled_hypergradient(
        lambda v, theta: ((v - theta) ** 2).sum(), lambda v, theta: v.sum(), lambda theta: 0 * theta, meta, solver
    )
    # v_k = 0.8 v_(k-1) + 0.2 theta, from zero.
    torch.testing.assert_close(gradient, torch.full_like(meta, 1 - 0.8**3), rtol=1e-12, atol=0)
    assert not info.inner_params.requires_grad and not info.outer_loss.requires_grad
