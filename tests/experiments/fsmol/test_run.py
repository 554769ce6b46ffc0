import json

import numpy as np
import pytest
import torch

from ibaml.data.sources.fsmol import FILE_NAME
from ibaml.experiments.fsmol import run as fsmol
from ibaml.experiments.fsmol.plot import fsmol_figure
from ibaml.experiments.fsmol.report import FSMOL, assay_rows, rows, summary
from ibaml.experiments.fsmol.run import BASELINES, FsmolSettings
from ibaml.experiments.report import Place, run_experiment
from ibaml.recipes import get_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Assays in which a molecule is active if it has one of two entries, another pair in each assay."""
    generator = np.random.default_rng(0)
    num_molecules, sizes = 600, [140] * 20 + [60] * 6
    has = generator.random((num_molecules, 12)) < 0.3
    has[:, 0] |= ~has.any(1)
    rows = []
    for task, size in enumerate(sizes):
        wanted = generator.choice(12, size=2, replace=False)
        # The last three assays share no molecule with the others.
        pool = np.arange(500, 600) if task >= len(sizes) - 3 else np.arange(500)
        for molecule in generator.choice(pool, size=size, replace=False):
            rows.append((task, molecule, int(has[molecule, wanted].any())))
    task, molecule, label = (np.array(column) for column in zip(*rows, strict=True))
    folder = tmp_path_factory.mktemp("data")
    values = {
        "task_name": np.array([f"CHEMBL{index}" for index in range(len(sizes))]),
        "task_split": np.array(["train"] * 20 + ["valid"] * 6),
        "row_task": task,
        "row_mol": molecule,
        "label": label.astype(np.uint8),
        "fp_ptr": np.concatenate([[0], np.cumsum(has.sum(1))]),
        "fp_index": (np.nonzero(has)[1] * 100).astype(np.uint16),
        "fp_count": np.ones(has.sum(), dtype=np.uint8),
    }
    np.savez(folder / FILE_NAME, **values)
    np.savez(folder / "mine.npz", **{**values, "task_split": np.array(["mine"] * len(sizes))})
    return folder


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    settings = FsmolSettings(
        methods=("fsmol_ibaml", "logistic_regression"), support_sizes=(16, 48), num_draws=2, num_steps=20
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsmol, "get_recipe", lambda name: get_recipe(name).replace({"trainer.num_validation_tasks": 3}))
        return fsmol.run(settings, Place(tmp_path_factory.mktemp("out"), data)), settings


def test_all_methods_are_scored_on_all_large_enough_assays(result):
    found, settings = result
    assert len(found.assays[16]) == 6 and found.trained[0].num_steps == 20
    for by_method in found.scores.values():
        assert set(by_method) == set(settings.methods)
        for values in by_method.values():
            assert all(len(value) == 6 and value.isfinite().all() for value in values.values())
    assert found.seen is not None and found.seen[16].tolist() == [1.0] * 3 + [0.0] * 3


def test_learning_from_other_assays_beats_chance_and_more_molecules_help(result):
    scores = result[0].scores
    for method in ("fsmol_ibaml", "logistic_regression"):
        small, large = (float(scores[size][method]["delta_auprc"].mean()) for size in (16, 48))
        assert 0.05 < small < large


def test_report_and_figure_hold_the_numbers(result):
    found, _ = result
    table = rows(found)
    assert len(table) == 4 and table[0]["delta_auprc_difference"] == 0
    first = found.scores[16]["logistic_regression"]["nll"] - found.scores[16]["fsmol_ibaml"]["nll"]
    assert table[1]["nll_difference"] == pytest.approx(float(first.mean()))
    assert len(assay_rows(found)) == 2 * 2 * 6
    text = summary(found)
    assert "## 16 molecules known (6 assays)" in text and "| iBaML, inner steps | 20 of 20 |" in text
    assert "molecules in training assays (3 assays) | mostly not (3 assays)" in text
    assert len(fsmol_figure(found).axes) == 3


def test_assays_of_another_file_are_predicted_with_the_trained_runs(data, tmp_path):
    settings = FsmolSettings(
        methods=("fsmol", "nearest_neighbours"),
        file=data / "mine.npz",
        split="mine",
        support_sizes=(16,),
        num_draws=1,
        num_steps=1,
    )
    found = fsmol.run(settings, Place(tmp_path, data))
    assert len(found.assays[16]) == 26 and found.seen is None
    assert "split 'mine' of mine.npz" in summary(found)
    assert fsmol_figure(found).get_suptitle().startswith("FS-Mol: mine.npz")
    with pytest.raises(ValueError, match="support_sizes has 200, but no assay has the 210 rows"):
        fsmol.run(FsmolSettings(methods=("nearest_neighbours",), support_sizes=(200,)), Place(tmp_path, data))


def test_the_command_leaves_tables_a_picture_and_its_settings(data, tmp_path):
    settings = FsmolSettings(
        methods=("nearest_neighbours",), file=data / "mine.npz", split="mine", support_sizes=(16,), num_draws=1
    )
    run_experiment(FSMOL, settings, Place(tmp_path, data))
    assert {"README.md", "fsmol.csv", "assays.csv", "fsmol.png"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "settings.json").read_text())["file"].endswith("mine.npz")


def test_scores_are_those_of_the_definitions():
    probability, labels = torch.tensor([0.9, 0.6, 0.2, 0.1]), torch.tensor([1, 0, 1, 0])
    precision, nll, ece = fsmol.score(probability, labels)
    assert precision == pytest.approx((1 + 2 / 3) / 2 - 0.5)
    assert nll == pytest.approx(-np.log([0.9, 0.4, 0.2, 0.9]).mean(), rel=1e-6)
    # Confidences 0.9, 0.6, 0.8, 0.9, of which the first and the last are right; bins of a fifteenth.
    assert ece == pytest.approx((2 * 0.1 + 0.6 + 0.8) / 4, rel=1e-6)


def test_recipes_differ_in_what_adapts():
    assert get_recipe("fsmol_ibaml").adapt == get_recipe("fsmol_maml").adapt == ("head.*",)
    assert get_recipe("fsmol_maml_all_layers").adapt == ("*",)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="methods names svm; there are fsmol, fsmol_prototypes, fsmol_ibaml,"):
        FsmolSettings(methods=("svm",))
    with pytest.raises(ValueError, match="methods is empty"):
        FsmolSettings(methods=())
    with pytest.raises(ValueError, match=r"support_sizes must be one or more numbers of at least 2, but is \(1,\)"):
        FsmolSettings(support_sizes=(1,))
    for field in ("num_draws", "max_queries", "num_steps"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, but is 0"):
            FsmolSettings(**{field: 0})
    with pytest.raises(ValueError, match="max_minutes must be positive, but is 0"):
        FsmolSettings(max_minutes=0)
    assert FsmolSettings(methods=tuple(BASELINES), num_steps=3).recipes() == []
