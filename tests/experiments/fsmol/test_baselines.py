import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ibaml.experiments.fsmol import baselines as assay_baselines
from ibaml.experiments.fsmol.baselines import average_precision, nearest_neighbours
from ibaml.types import Batch


@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_average_precision_is_that_of_scikit_learn_also_with_ties(num_levels):
    generator = np.random.default_rng(num_levels)
    for _ in range(20):
        scores = generator.integers(num_levels, size=30) / num_levels
        labels = generator.integers(2, size=30)
        labels[0] = 1
        assert np.isclose(average_precision(scores, labels), average_precision_score(labels, scores), rtol=1e-12)
    with pytest.raises(ValueError, match="labels has no 1"):
        average_precision(scores, np.zeros(30, dtype=np.int64))


def test_neighbours_vote_by_tanimoto_similarity():
    support = Batch(torch.tensor([[1.0, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 9]]), torch.tensor([1, 0, 1]))
    query = torch.tensor([[3.0, 1, 1, 0]])
    # Two of three entries in common with the first and with the second, none with the third.
    assert torch.allclose(nearest_neighbours(support, query, num_neighbours=2), torch.tensor([0.5]))
    assert torch.allclose(
        nearest_neighbours(support, query, num_neighbours=9), torch.tensor([(2 / 3 + 1) / (4 / 3 + 2)])
    )
    assert nearest_neighbours(support, torch.zeros(1, 4)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["nearest_neighbours", "random_forest", "logistic_regression"])
def test_every_baseline_learns_which_entry_makes_a_molecule_active(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((300, 12), 0.7), generator=generator)
    y = (x[:, 3] > 0).long()
    # Neighbours cannot single out an entry: most of the others repeat it.
    x[:, 4:9] = torch.where(torch.rand(300, 5, generator=generator) < 0.8, x[:, 3:4], x[:, 4:9])
    found = getattr(assay_baselines, name)(Batch(x[:64], y[:64]), x[64:])
    assert found.shape == (236,) and found.min() > 0 and found.max() < 1
    assert ((found > 0.5) == y[64:]).float().mean() > 0.85
