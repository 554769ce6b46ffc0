"""`ibaml predict` from files to files."""

import csv
import dataclasses
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ibaml import MetaLearner, SplitSettings
from ibaml.cli import main
from ibaml.data.sources import ImageFolder
from ibaml.learner.files import predict_files, read_table
from ibaml.recipes import get_recipe
from ibaml.recipes.runs import load_fitted, train_run

CPU = torch.device("cpu")


def students(num_schools: int = 4, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = []
    for school in range(num_schools):
        hours = rng.uniform(0, 10, 12)
        score = 40 + rng.normal(4, 1) * hours + rng.normal(0, 3, 12)
        parts.append(
            pd.DataFrame({"school": f"s{school}", "hours": hours, "sleep": rng.uniform(5, 9, 12), "score": score})
        )
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MetaLearner(likelihood="gaussian").fit(students(), task="school", target="score", num_steps=2).save(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    table = students().assign(passed=lambda t: np.where(t.score > 60, "yes", "no")).drop(columns="score")
    MetaLearner().fit(table, task="school", target="passed", num_steps=2).save(folder)
    return folder


def predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["predict", *map(str, arguments)])
    return caught.value.code


def test_a_model_of_a_formula_predicts_tables_with_its_columns(tmp_path):
    learner = MetaLearner(likelihood="gaussian")
    learner.fit(students(), task="school", formula="score ~ scale(hours) * np.log(sleep)", num_steps=2).save(tmp_path)
    new = students(1, seed=5)
    new[:5].to_csv(tmp_path / "support.csv", index=False)
    new[5:].drop(columns="score").to_csv(tmp_path / "query.csv", index=False)
    files = ("--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", "--out", tmp_path / "out.csv")
    assert predict(tmp_path, *files) == 0
    expected = learner.adapt(new[:5], new[:5]["score"]).predict(new[5:]).mean
    np.testing.assert_allclose(read_table(tmp_path / "out.csv")["predicted"], expected, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_new_task_in_a_table(tmp_path, model, suffix):
    new = students(1, seed=5)
    files = {name: tmp_path / f"{name}{suffix}" for name in ("support", "query", "out")}
    for name, rows in (("support", new[:5]), ("query", new[5:].drop(columns="score"))):
        rows.to_csv(files[name], index=False) if suffix == ".csv" else rows.to_parquet(files[name], index=False)
    code = predict(
        model, "--support", files["support"], "--query", files["query"], "--out", files["out"], "--level", 0.8
    )
    assert code == 0
    written = read_table(files["out"])
    assert list(written) == [
        "school", "hours", "sleep", "predicted", "lower_80", "upper_80", "noise_std", "epistemic_std",
    ]  # fmt: skip
    prediction = MetaLearner.load(model).adapt(new[:5], new.score[:5]).predict(new[5:])
    np.testing.assert_allclose(written.predicted, prediction.mean)
    np.testing.assert_allclose(written.lower_80, prediction.interval(0.8)[0])
    np.testing.assert_allclose(written.epistemic_std**2, prediction.epistemic)
    np.testing.assert_allclose(written.hours, new.hours[5:])


def test_several_tasks_are_told_apart_by_their_column(tmp_path, model):
    new = students(3, seed=6)
    first = new.groupby("school").cumcount() < 4
    support, query = new[first], new[~first].sample(frac=1, random_state=0).reset_index(drop=True)
    support.to_csv(tmp_path / "support.csv", index=False)
    query.to_csv(tmp_path / "query.csv", index=False)
    assert predict_files(
        load_fitted(model, device=CPU), tmp_path / "support.csv", tmp_path / "query.csv", tmp_path / "out.csv"
    ) == len(query)
    written = read_table(tmp_path / "out.csv")
    learner = MetaLearner.load(model)
    for school in new.school.unique():
        own = support[support.school == school]
        rows = (query.school == school).to_numpy()
        expected = learner.adapt(own, own.score).predict(query[rows]).mean
        np.testing.assert_allclose(written.predicted[rows], expected, rtol=1e-5)


def test_a_task_without_support_is_answered_from_the_prior(tmp_path, model):
    new = students(2, seed=6)
    new[:12].to_csv(tmp_path / "support.csv", index=False)
    new[10:].to_csv(tmp_path / "query.csv", index=False)
    predict_files(load_fitted(model, device=CPU), *(tmp_path / f"{name}.csv" for name in ("support", "query", "out")))
    expected = MetaLearner.load(model).adapt(new[:0], new.score[:0]).predict(new[12:])
    written = read_table(tmp_path / "out.csv")[2:]
    np.testing.assert_allclose(written.predicted, expected.mean)
    np.testing.assert_allclose(written.epistemic_std**2, expected.epistemic)


def test_classes(tmp_path, classifier):
    new = students(1, seed=5).assign(passed=["yes", "no"] * 6)
    new[:6].to_csv(tmp_path / "support.csv", index=False)
    new[6:].drop(columns="passed").to_csv(tmp_path / "query.csv", index=False)
    predict_files(load_fitted(classifier, device=CPU), *(tmp_path / f"{n}.csv" for n in ("support", "query", "out")))
    written = read_table(tmp_path / "out.csv")
    assert set(written.predicted) <= {"yes", "no"}
    np.testing.assert_allclose(written.probability_yes + written.probability_no, 1, rtol=1e-6)
    assert (written.epistemic >= 0).all() and (written.entropy >= written.epistemic - 1e-9).all()


def test_abstention_and_foreign_examples_have_columns(tmp_path, classifier, capsys):
    new = students(1, seed=5).assign(passed=["yes", "no"] * 6)
    new[:6].to_csv(tmp_path / "support.csv", index=False)
    new[6:].drop(columns="passed").to_csv(tmp_path / "query.csv", index=False)
    files = ("--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", "--out", tmp_path / "out.csv")
    assert predict(classifier, *files) == 0
    assert "abstains" not in read_table(tmp_path / "out.csv")
    assert predict(classifier, *files, "--max-error", 0.1) == 2
    assert "max_error needs to know how often confident predictions are wrong" in capsys.readouterr().err
    held_out = students(40, seed=7).assign(passed=lambda t: np.where(t.score > 60, "yes", "no")).drop(columns="score")
    learner = MetaLearner.load(classifier).calibrate(held_out)
    learner.save(tmp_path / "model")
    assert predict(tmp_path / "model", *files, "--max-error", 0.99) == 0
    written = read_table(tmp_path / "out.csv")
    prediction = learner.adapt(new[:6], new.passed[:6]).predict(new[6:], max_error=0.99)
    np.testing.assert_allclose(written.out_of_task, prediction.out_of_task, rtol=1e-5)
    assert written.abstains.dtype == bool and written.abstains.tolist() == prediction.abstains.tolist()


def test_images_of_a_saved_model_and_of_a_run(tmp_path):
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcdef"), ("validation", "ghijkl"), ("new", "xyzuv"), ("query", [""])):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(3):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(
                    tmp_path / split / name / f"{number}.png"
                )
    splits = SplitSettings(num_ways=5, num_shots=1, num_query_images=1)
    MetaLearner(algorithm="maml").fit(tmp_path / "train", splits=splits, num_steps=1).save(tmp_path / "model")
    recipe = get_recipe("glyphs_5way_5shot_maml").replace(
        {
            "network.arguments.in_channels": 3,
            "network.arguments.image_size": 16,
            "network.arguments.channels": 4,
            "trainer.num_steps": 1,
            "trainer.num_validation_tasks": 1,
        }
    )
    images = ImageFolder(path=str(tmp_path), image_size=16, num_shots=1, num_queries=1, num_test_queries=1)
    train_run(dataclasses.replace(recipe, data=images), tmp_path / "run")
    for folder in ("model", "run"):
        out = tmp_path / f"{folder}.csv"
        predict_files(load_fitted(tmp_path / folder, device=CPU), tmp_path / "new", tmp_path / "query", out)
        with out.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
        assert sum(float(rows[0][f"probability_{name}"]) for name in "xyzuv") == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("support", "query", "out", "message"),
    [
        (
            "support.csv",
            "query.csv",
            "out.txt",
            r"--out is .*out\.txt; expected a name that ends in \.csv or \.parquet",
        ),
        ("absent.csv", "query.csv", "out.csv", "there is no file .*absent.csv"),
        ("support.json", "query.csv", "out.csv", r"support\.json is no table; expected a file that ends in"),
        ("broken.parquet", "query.csv", "out.csv", "broken.parquet cannot be read as a table"),
        ("query.csv", "query.csv", "out.csv", "the support table has no column 'score', the target"),
        ("support.csv", "empty.csv", "out.csv", "the query table has no rows"),
        ("support.csv", "clash.csv", "out.csv", "the query table has columns named predicted, as the answers do"),
        (
            "support.csv",
            "text.csv",
            "out.csv",
            "column 'hours' of the query table holds text, such as 'many' .row 0., but",
        ),
        ("support.csv", "short.csv", "out.csv", "the query table has no column sleep"),
        (
            "support.csv",
            "nameless.csv",
            "out.csv",
            "column 'school' of the query table is missing in 2 rows, the first is",
        ),
    ],
)
def test_what_it_refuses(tmp_path, model, capsys, monkeypatch, support, query, out, message):
    monkeypatch.setenv("COLUMNS", "250")
    new = students(1, seed=5)
    rest = new[5:].drop(columns="score")
    tables = {
        "support": new[:5],
        "query": rest,
        "empty": rest[:0],
        "clash": rest.assign(predicted=0),
        "text": rest.assign(hours="many"),
        "short": rest.drop(columns="sleep"),
        "nameless": rest.assign(school=["new", None, None, *["new"] * 4]),
    }
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "support.json").write_text("{}")
    arguments = (tmp_path / support, "--query", tmp_path / query, "--out", tmp_path / out)
    assert predict(model, "--support", *arguments) == 2
    errors = " ".join(capsys.readouterr().err.split())

    assert re.search(message, errors), errors
    assert not (tmp_path / "out.csv").exists()


def test_levels_and_models_it_refuses(tmp_path, model, monkeypatch):
    fitted = load_fitted(model, device=CPU)
    with pytest.raises(ValueError, match="--level is 1.0; expected a probability strictly between"):
        predict_files(fitted, tmp_path, tmp_path, tmp_path / "out.csv", level=1.0)
    with pytest.raises(FileNotFoundError, match="has no model.safetensors: it holds no trained model"):
        load_fitted(tmp_path, device=CPU)
    x = np.arange(8.0)[:, None]
    arrays = MetaLearner(likelihood="gaussian").fit([(x, x[:, 0])], num_steps=1)
    students(1).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match="the model was fitted on arrays, so the target has no column name"):
        predict_files(arrays.fitted_model, tmp_path / "t.csv", tmp_path / "t.csv", tmp_path / "out.csv")

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"this needs pandas, which is not installed: pip install 'ibaml\[tables\]'"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("labels", [("0", "1"), ("EU", "NA"), ("01", "1"), ("1.0", "true")])
def test_text_that_looks_like_something_else_is_read_as_the_model_has_it(tmp_path, labels):
    """A CSV file does not say that its zeros and ones, or its NA, are text: labels, and categories of a feature."""
    table = students().drop(columns="score")
    table["region"] = pd.Categorical(np.where(table.sleep > 7, *labels))
    table["grade"] = np.where(table.hours > 5, *labels)
    learner = MetaLearner().fit(table, task="school", target="grade", num_steps=1)
    learner.save(tmp_path)
    new = table[:12]
    new[:6].to_csv(tmp_path / "support.csv", index=False)
    new[6:].drop(columns="grade").to_csv(tmp_path / "query.csv", index=False)
    predict_files(load_fitted(tmp_path, device=CPU), *(tmp_path / f"{n}.csv" for n in ("support", "query", "out")))
    written = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    expected = learner.adapt(new[:6], new.grade[:6]).predict(new[6:])
    assert written.predicted.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(written[f"probability_{labels[0]}"].astype(float), expected.probs[:, 0], rtol=1e-5)


def test_gaps_in_text_stay_gaps(tmp_path):
    pd.DataFrame({"grade": ["1", None, "2"], "other": [1.0, None, 2.0]}).to_csv(tmp_path / "a.csv", index=False)
    read = read_table(tmp_path / "a.csv", {"grade": ("1", "2", "3"), "absent": ("1",)})
    assert read.grade.isna().tolist() == [False, True, False] and read.grade[2] == "2" and read.other[2] == 2.0
    # A label that the model does not know leaves the column as it was read, for the message.
    assert read_table(tmp_path / "a.csv", {"grade": ("1", "3")}).grade[2] == 2.0
