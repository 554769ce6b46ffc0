"""Priors over columns against dense covariances."""

import re
from typing import Any

import pytest
import torch

from ibaml import records, tree
from ibaml.priors import COLUMN_PRIORS, DiagonalColumnPrior, FullColumnPrior, LowRankColumnPrior
from ibaml.types import Tensor

DOUBLE = torch.float64
LIKE = torch.zeros(0, dtype=DOUBLE)
NUM_INPUTS, NUM_COLUMNS = 5, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_member(family: Any, num_inputs: int = NUM_INPUTS, seed: int = 0) -> Any:
    source = generator(seed)
    first = family.init(num_inputs, NUM_COLUMNS, like=LIKE)
    return tree.map(lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE), first)


def dense_covariance(member: Any) -> Tensor:
    """By hand, ``[num_priors, num_inputs, num_inputs]``."""
    if hasattr(member, "lower"):
        unit = torch.eye(member.log_scale.shape[-1], dtype=DOUBLE).repeat(len(member.log_scale), 1, 1)
        rows, columns = torch.tril_indices(*unit.shape[-2:], -1)
        unit[:, rows, columns] = member.lower
        factor = torch.diag_embed(torch.exp(member.log_scale)) @ unit
        return factor @ factor.mT
    variances = torch.exp(member.log_var)
    if not hasattr(member, "loadings"):
        return torch.diag_embed(variances)
    factors = variances.sqrt().unsqueeze(-1) * member.loadings
    return torch.diag_embed(variances) + factors @ factors.mT


@pytest.fixture(params=list(COLUMN_PRIORS))
def record(request: pytest.FixtureRequest) -> Any:
    return COLUMN_PRIORS[request.param]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_inputs", [1, 2, NUM_INPUTS])
def test_whitened_features_have_the_dense_covariance(record: Any, num_inputs: int, tied: bool) -> None:
    family = record(tied=tied)
    member = random_member(family, num_inputs)
    features = torch.randn(7, num_inputs, generator=generator(1), dtype=DOUBLE)
    whitened = family.whiten(member, features)
    assert whitened.shape[:2] == (1 if tied else NUM_COLUMNS, 7)
    expected = features @ dense_covariance(member) @ features.mT
    torch.testing.assert_close(whitened @ whitened.mT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_colouring_is_what_whitened_features_see(record: Any, tied: bool) -> None:
    family = record(tied=tied)
    member = random_member(family)
    features = torch.randn(7, NUM_INPUTS, generator=generator(1), dtype=DOUBLE)
    whitened = family.whiten(member, features)
    draw = torch.randn(NUM_COLUMNS, whitened.shape[-1], generator=generator(2), dtype=DOUBLE)
    weights = family.colour(member, draw)
    assert weights.shape == (NUM_COLUMNS, NUM_INPUTS)
    found = (whitened @ draw.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, weights @ features.mT, rtol=1e-12, atol=1e-12)


def test_training_starts_at_zero_mean_with_the_variances_that_were_asked_for(record: Any) -> None:
    family = record(initial_variance=2.0, initial_bias_variance=0.3)
    member = family.init(NUM_INPUTS, NUM_COLUMNS, like=LIKE)
    variances = torch.diagonal(dense_covariance(member), dim1=-2, dim2=-1)
    expected = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.3], dtype=DOUBLE).expand(NUM_COLUMNS, -1)
    torch.testing.assert_close(variances, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(family.mean(member), torch.zeros(NUM_COLUMNS, NUM_INPUTS, dtype=DOUBLE))
    assert all(leaf.dtype == DOUBLE for leaf in tree.leaves(member))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("learn_mean", [False, True])
def test_mean_is_learned_or_zero(record: Any, learn_mean: bool, tied: bool) -> None:
    family = record(learn_mean=learn_mean, tied=tied)
    member = random_member(family)
    assert family.mean(member).shape == (1 if tied else NUM_COLUMNS, NUM_INPUTS)
    assert bool(family.mean(member).any()) == learn_mean
    where, wide = family.parameter_groups(member)
    assert sorted(map(id, where + wide)) == sorted(map(id, tree.leaves(member)))
    assert where[0] is member.mean


def test_loadings_do_not_start_where_their_gradient_is_zero() -> None:
    family = LowRankColumnPrior(rank=2)
    member = family.init(NUM_INPUTS, 1, like=LIKE)
    features = torch.randn(7, NUM_INPUTS, generator=generator(1), dtype=DOUBLE)

    def weighted(other: Any) -> Tensor:
        whitened = family.whiten(other, features)
        return (whitened @ whitened.mT).sum()

    slope = torch.func.grad(weighted)(member).loadings
    assert (slope.abs().sum(-2) > 1e-3).all()
    # Two factors that start alike would stay alike.
    first, second = member.loadings[0].unbind(-1)
    assert abs(float(first @ second) / float(first.norm() * second.norm())) < 0.5


def test_families_survive_json(record: Any) -> None:
    family = record(tied=True, initial_variance=0.5)
    assert records.from_json(records.to_json(family), COLUMN_PRIORS.values()) == family


def test_only_a_diagonal_family_says_so() -> None:
    assert [record().is_diagonal for record in COLUMN_PRIORS.values()] == [True, False, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiagonalColumnPrior(initial_variance=0.0), "initial_variance must be positive and finite, but is 0.0"),
        (
            lambda: FullColumnPrior(initial_bias_variance=float("inf")),
            "initial_bias_variance must be positive and finite, but is inf",
        ),
        (lambda: LowRankColumnPrior(rank=0), "rank must be at least 1, but is 0."),
        (
            lambda: FullColumnPrior().init(2_001, 1, like=LIKE),
            "a covariance of 2001 weights has 4004001 entries; expected at most 2000 adapted weights: use "
            "DiagonalColumnPrior or LowRankColumnPrior.",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("learn_mean", [False, True])
@pytest.mark.parametrize("num_inputs", [1, NUM_INPUTS])
def test_moments_give_their_member(record: Any, num_inputs: int, tied: bool, learn_mean: bool) -> None:
    """Of a member's own moments it is that member; independent weights keep the variances of any; factors are none."""
    family = record(tied=tied, learn_mean=learn_mean)
    member = random_member(family, num_inputs)
    found = family.from_moments(family.mean(member), dense_covariance(member), like=member)
    if record is LowRankColumnPrior:
        assert found is None
        return
    for one, other in zip(found, member, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    other = random_member(FullColumnPrior(tied=tied), num_inputs, seed=3)
    single = tree.map(torch.Tensor.float, member)
    found = family.from_moments(family.mean(member), dense_covariance(other), like=single)
    assert {leaf.dtype for leaf in tree.leaves(found)} == {torch.float32}
    torch.testing.assert_close(
        torch.diagonal(dense_covariance(tree.map(torch.Tensor.double, found)), dim1=-2, dim2=-1),
        torch.diagonal(dense_covariance(other), dim1=-2, dim2=-1),
        rtol=1e-5,
        atol=0,
    )
