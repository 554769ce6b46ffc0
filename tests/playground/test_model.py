"""A saved model says what it is and predicts uploads; what does not fit is refused in the library's own words."""

import base64
import csv
import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from benchmarks.pen import sketch
from PIL import Image

from ibaml import MetaLearner
from ibaml.networks import MLP
from ibaml.playground import model
from ibaml.playground.strokes import draw
from ibaml.playground.train import CURVES, DRAWINGS, MODELS


def upload(name, content):
    return {"name": name, "base64": base64.b64encode(content).decode()}


def picture(figure, seed):
    buffer = io.BytesIO()
    Image.fromarray(draw(sketch(figure, np.random.default_rng(seed)))[0]).save(buffer, format="PNG")
    return buffer.getvalue()


def archive(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)
    hours = [rng.uniform(0, 10, 8).round(1) for _ in range(12)]
    scores = [30 + 4 * rng.normal() + 4 * x + rng.normal(size=8) for x in hours]
    return [
        pd.DataFrame({"school": f"s{number}", "hours": x, "score": y})
        for number, (x, y) in enumerate(zip(hours, scores, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    learner = MetaLearner(likelihood="gaussian").fit(pd.concat(parts), task="school", target="score")
    return learner.save(tmp_path_factory.mktemp("models") / "scores")


def as_upload(table, name="known.csv"):
    return upload(name, table.to_csv(index=False).encode())


def test_what_a_model_of_tables_is(folder):
    about = dict(model.answer({"folder": f" {folder} "})["about"])
    assert about["predicts"] == "numbers (gaussian)" and about["inputs"] == "columns hours"
    assert about["target"] == "score" and about["groups"] == "column school"
    assert about["calibration"] == "predictions as they are"


def test_what_the_shipped_models_are():
    drawings = dict(model.answer({"folder": str(MODELS / DRAWINGS)})["about"])
    assert drawings["predicts"] == "classes that each task has of its own"
    assert drawings["inputs"] == "images, grey, resized to 28 x 28"
    assert "made" in drawings["calibration"]
    assert dict(model.answer({"folder": str(MODELS / CURVES)})["about"])["inputs"] == "arrays of shape (1,)"


def test_what_a_model_of_shared_classes_is():
    rng = np.random.default_rng(0)
    tasks = [(x, np.where(x[:, 0] > 0, "active", "inactive")) for x in rng.normal(size=(4, 10, 2))]
    learner = MetaLearner(MLP(2, input_shape=2)).fit(tasks, num_steps=1)
    assert dict(model.describe(learner))["predicts"] == "one of the classes active, inactive"


def test_predictions_are_those_of_the_library(folder, parts):
    known, asked = parts[0][:3], parts[0][3:].drop(columns="score")
    told = model.answer({"folder": str(folder), "support": as_upload(known), "query": as_upload(asked, "asked.csv")})
    expected = MetaLearner.load(folder).adapt(known, known["score"]).predict(asked).mean
    place = told["header"].index("predicted")
    np.testing.assert_allclose([float(row[place]) for row in told["rows"]], expected, rtol=1e-3)
    whole = list(csv.reader(io.StringIO(told["csv"])))
    assert whole[0] == told["header"] and len(whole) == told["num_rows"] + 1 == 6


def test_images_in_archives():
    support = archive(
        {f"mine/{name}/{seed}.png": picture(name, seed) for name in ("house", "star") for seed in (1, 2)}
        | {"mine/notes.txt": b"no image", "mine/../out.png": b"", "__MACOSX/mine/house/1.png": b""}
    )
    query = archive({"mine/a.png": picture("star", 3), "mine/b.png": picture("house", 3)})
    told = model.answer(
        {"folder": str(MODELS / DRAWINGS), "support": upload("s.zip", support), "query": upload("q.ZIP", query)}
    )
    assert [row[:2] for row in told["rows"]] == [["a.png", "star"], ["b.png", "house"]]
    assert "out_of_task" in told["header"]


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (None, "one file is missing; expected both"),
        ("known.csv", "support is str; expected an uploaded file"),
        (upload("known.xlsx", b""), r"known.xlsx is no table and no archive; expected a .csv, .parquet or .zip file"),
        (upload("known.zip", b"PK"), "known.zip cannot be read as a zip archive"),
        ({"name": "a.csv", "base64": "?"}, "a.csv was not sent whole"),
        (upload("a.csv", b"school,score\ns0,3\n"), "the support table has no column hours"),
        (upload("a.csv", b""), "^support.csv cannot be read as a table: No columns to parse from file"),
    ],
)
def test_refused_uploads(folder, parts, support, message):
    query = as_upload(parts[0].drop(columns="score"))
    with pytest.raises(ValueError, match=message):
        model.answer({"folder": str(folder), "support": support, "query": query})


def test_refused_folders(tmp_path):
    with pytest.raises(ValueError, match="no folder is named"):
        model.answer({"folder": " "})
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        model.answer({"folder": str(tmp_path)})


def test_too_much_in_an_archive(monkeypatch):
    monkeypatch.setattr(model, "MOST_UNPACKED", 2**20)
    packed = upload("big.zip", archive({"a/1.png": b"0" * (2**20 + 1)}))
    with pytest.raises(ValueError, match="big.zip holds more than 1 MiB of images"):
        model.answer({"folder": str(MODELS / DRAWINGS), "support": packed, "query": packed})
