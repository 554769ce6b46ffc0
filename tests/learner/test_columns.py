"""Predictions from tables for models of tensors: the columns are the inputs, in order, and then the targets."""

import pandas as pd
import pytest
import torch

from ibaml import MetaLearner
from ibaml.data import SinusoidTasks
from ibaml.learner.files import predict_files
from ibaml.networks import MLP


@pytest.fixture(scope="module")
def learner():
    network = MLP(1, input_shape=1, hidden_sizes=(3,), generator=torch.Generator().manual_seed(0))
    return MetaLearner(network, "maml", "gaussian").fit(SinusoidTasks(num_shots=3, num_queries=3), num_steps=1)


def test_columns_in_order(tmp_path, learner):
    support = pd.DataFrame({"time": [0.0, 1.0], "height": [1.0, 2.0]})
    support.to_csv(tmp_path / "support.csv", index=False)
    pd.DataFrame({"time": [0.5]}).to_csv(tmp_path / "query.csv", index=False)
    out = tmp_path / "out.csv"
    assert predict_files(learner.fitted_model, tmp_path / "support.csv", tmp_path / "query.csv", out) == 1
    x, y = (torch.tensor(support[name].to_numpy())[:, None].float() for name in support)
    expected = learner.adapt(x, y).predict(torch.tensor([[0.5]])).mean
    assert float(pd.read_csv(out)["predicted"][0]) == pytest.approx(float(expected), abs=1e-6)


def test_other_columns_are_refused(tmp_path, learner):
    pd.DataFrame({"a": [0.0], "b": [1.0], "c": [1.0]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        ValueError, match="the support table has 3 columns, but the model needs 1 inputs and after them 1"
    ):
        predict_files(learner.fitted_model, tmp_path / "t.csv", tmp_path / "t.csv", tmp_path / "out.csv")
