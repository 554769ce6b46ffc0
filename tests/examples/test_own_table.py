from collections.abc import Callable
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("own_table")


def test_it_beats_a_ridge_per_patient_and_saves_the_model(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "NUM_PATIENTS", {"train": 60, "held out": 10, "test": 12})
    example.main(["--folder", str(tmp_path / "model")])
    output = capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").is_file()
    figures = {
        line.rsplit(maxsplit=3)[0].strip(): [float(number) for number in line.split()[-3:]]
        for line in output.splitlines()
        if line.startswith(("ibaml", "ridge"))
    }
    (rmse, coverage, width), (ridge_rmse, _, _) = figures["ibaml"], figures["ridge per patient"]
    # The noise has a standard deviation of 3, so that no method can be below it by much.
    assert 2.8 < rmse < ridge_rmse
    assert 0.8 < coverage < 0.98
    assert width > 9


def test_ridge_is_that_of_scikit_learn(example):
    patient = example.make_patients(1, np.random.default_rng(0))
    known, asked = patient[:8], patient[8:]

    def design(table: pd.DataFrame) -> np.ndarray:
        return np.c_[np.ones(len(table)), np.log1p(table["dose"]) - 3.5, table["fasting"] - 0.5]

    reference = Ridge(alpha=0.1, fit_intercept=False).fit(design(known), known["response"])
    mean, deviation = example.ridge(known, asked)
    np.testing.assert_allclose(mean, reference.predict(design(asked)), rtol=1e-10)
    residuals = known["response"] - reference.predict(design(known))
    np.testing.assert_allclose(deviation, np.sqrt((residuals**2).sum() / 5), rtol=1e-10)
