"""Tables with categories, gaps and dates through a learner: fit, adapt, update, evaluate, calibrate, save, files."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ibaml import MetaLearner, TrainerSettings
from ibaml.baselines import compare_with_baselines
from ibaml.cli import main
from ibaml.learner.files import read_table
from ibaml.recipes.runs import evaluate_run

STEPS = 2
COLUMNS = {"task": "school", "target": "score"}


def students(num_schools: int = 6, seed: int = 0, num_students: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size = num_schools * num_students
    table = pd.DataFrame(
        {
            "school": np.repeat([f"s{number}" for number in range(num_schools)], num_students),
            "hours": rng.uniform(0, 10, size),
            "kind": rng.choice(["day", "boarding", "evening"], size),
            "sex": rng.choice(["f", "m"], size),
        }
    )
    score = 40 + 4 * table.hours + 10 * (table.kind == "day") + rng.normal(0, 3, size)
    table["hours"] = table.hours.where(rng.random(size) < 0.8)
    table["kind"] = table.kind.where(rng.random(size) < 0.9)
    return table.assign(score=score)


def by_hand(table: pd.DataFrame, mean: float) -> pd.DataFrame:
    """What a user without such columns would do."""
    kinds = pd.get_dummies(table.kind.astype(object), dummy_na=True, dtype=float).set_axis(list("abcd"), axis=1)
    hours = pd.DataFrame({"hours": table.hours.fillna(mean), "unknown": table.hours.isna().astype(float)})
    rest = pd.DataFrame({"male": (table.sex == "m").astype(float), "school": table.school, "score": table.score})
    return pd.concat([hours, kinds, rest], axis=1)


def learner_of(table, **how) -> MetaLearner:
    return MetaLearner(likelihood="gaussian").fit(table, **{**COLUMNS, "num_steps": STEPS, **how})


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    return learner_of(students())


def test_it_is_a_fit_on_features_by_hand(learner):
    mean = students().hours.mean()
    other = learner_of(by_hand(students(), mean))
    new = students(1, seed=5)
    first, second = (
        one.adapt(table[:5], table.score[:5]).update(table[5:7], table.score[5:7]).predict(table[7:])
        for one, table in ((learner, new), (other, by_hand(new, mean)))
    )
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-12)
    np.testing.assert_allclose(first.total_uncertainty, second.total_uncertainty, rtol=1e-12)
    held_out = students(3, seed=6)
    assert learner.evaluate(held_out) == other.evaluate(by_hand(held_out, mean))


def test_pairs_of_tables_are_the_same_as_a_long_table(learner):
    def pairs(table):
        return {name: (group.drop(columns="school"), group.score) for name, group in table.groupby("school")}

    features = pairs(students().drop(columns="score").assign(score=0.0)).items()
    tasks = {name: (x.drop(columns="score"), students().score[x.index]) for name, (x, _) in features}
    other = MetaLearner(likelihood="gaussian").fit(tasks, num_steps=STEPS)
    assert other.preprocessing.columns == learner.preprocessing.columns
    # Further columns, of dates here, are passed over.
    held_out = students(3, seed=6).assign(born=pd.Timestamp("2026-01-01"))
    assert other.evaluate(pairs(held_out)) == learner.evaluate(held_out)


def test_tables_of_arrow(learner):
    new = students(2, seed=5)
    as_arrow = pa.Table.from_pandas(new)
    assert learner.evaluate(as_arrow) == learner.evaluate(new)
    own = pa.Table.from_pandas(new[:12])
    expected = learner.adapt(new[:12], new.score[:12]).predict(new[:12])
    np.testing.assert_array_equal(learner.adapt(own, own["score"]).predict(own).mean, expected.mean)
    assert learner_of(pa.Table.from_pandas(students())).preprocessing.columns == learner.preprocessing.columns


def test_columns_named_by_integers():
    table = students().set_axis([0, 1, 2, 3, 4], axis=1)
    learner = MetaLearner(likelihood="gaussian").fit(table, task=0, target=4, num_steps=STEPS)
    assert learner.preprocessing.feature_names == ("1", "2", "3")
    new = table[:12]
    assert learner.adapt(new[:6], new[4][:6]).predict(new[6:]).mean.shape == (6,)
    assert learner.evaluate(table)["mse"].num_tasks == 6


def test_held_out_tasks_do_not_reach_the_columns():
    table = students()
    table.loc[table.school == "s3", "kind"] = "night"
    assert "night" in learner_of(table).preprocessing.columns[1].categories
    message = "column 'kind' holds 'night', which training has not seen"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        learner = learner_of(table[table.school != "s3"], validation_tasks=table)
    assert len(caught) == 1 and learner.preprocessing.columns[1].categories == ("boarding", "day", "evening", None)


def test_what_is_unseen_is_a_warning_everywhere(learner):
    new = students(3, seed=5).assign(kind="night")
    own = new[:12]
    posterior = learner.adapt(students()[:12], students().score[:12])
    for use in (
        lambda: learner.adapt(own, own.score),
        lambda: posterior.update(own, own.score),
        lambda: posterior.predict(own),
        lambda: learner.evaluate(new),
        lambda: learner_of(students()).calibrate(students(10, seed=5).assign(kind="night")),
    ):
        with pytest.warns(RuntimeWarning, match="column 'kind' holds 'night', which training") as caught:
            use()
        assert len(caught) == 1


def test_a_saved_learner_knows_its_columns(tmp_path, learner):
    learner.save(tmp_path)
    loaded = MetaLearner.load(tmp_path)
    assert loaded.preprocessing.columns == learner.preprocessing.columns
    new = students(1, seed=5)
    first, second = (one.adapt(new[:5], new.score[:5]).predict(new[5:]) for one in (learner, loaded))
    np.testing.assert_array_equal(first.mean, second.mean)


def test_a_run_belongs_to_its_categories(tmp_path):
    settings = TrainerSettings(num_steps=1, tasks_per_step=2)
    how = {"settings": settings, "num_steps": None, "run_folder": tmp_path}
    learner_of(students(), **how)
    assert learner_of(students(), **how).training_result.num_steps == 1
    renamed = students().replace({"kind": {"evening": "later"}})
    with pytest.raises(ValueError, match=r"data.columns.kind.categories.* was .*evening.* and is now .*later"):
        learner_of(renamed, **how)


def test_baselines_take_the_same_columns(learner):
    result = compare_with_baselines(learner, students(), 0.3, students(3, seed=4), baselines=["ridge"], seconds=1.0)
    assert result.num_tasks == 3


def files(tmp_path, **tables: pd.DataFrame):
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return [tmp_path / f"{name}.csv" for name in tables]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    return caught.value.code


def test_files_with_text_gaps_and_dates(tmp_path, capsys):
    train, support, query = files(
        tmp_path,
        train=students().assign(born="2012-05-01"),
        support=students(1, seed=5)[:6],
        query=students(1, seed=5)[6:].drop(columns="score").assign(born="2012-05-02"),
    )
    with pytest.raises(
        TypeError, match="column 'born' of the training tasks holds dates as text, such as '2012-05-01'"
    ):
        learner_of(pd.read_csv(train))
    learner = learner_of(pd.read_csv(train), features=["hours", "kind", "sex"])
    learner.save(tmp_path / "model")
    out = tmp_path / "out.csv"
    assert run("predict", tmp_path / "model", "--support", support, "--query", query, "--out", out) == 0
    written, asked = read_table(out), pd.read_csv(query)
    pd.testing.assert_frame_equal(written[asked.columns], asked)
    assert "nan" not in out.read_text()
    known = pd.read_csv(support)
    np.testing.assert_allclose(written.predicted, learner.adapt(known, known.score).predict(asked).mean, rtol=1e-6)
    # A column of numbers that a file fills with text.
    (bad,) = files(tmp_path, bad=asked.assign(hours="many"))
    assert run("predict", tmp_path / "model", "--support", support, "--query", bad, "--out", out) == 2
    assert "column 'hours' of the query table holds text, such as 'many' (row 0)" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_table_of_test_tasks_on_the_command_line(tmp_path, learner, capsys):
    test, bad = files(tmp_path, test=students(3, seed=8), bad=students(3, seed=8).assign(hours="many"))
    learner.save(tmp_path / "model")
    assert run("evaluate", tmp_path / "model", "--test", test) == 0
    assert "mse" in capsys.readouterr().out
    with pytest.raises(ValueError, match=re.escape("column 'hours' of the table holds text, such as 'many' (row 0)")):
        evaluate_run(tmp_path / "model", test=bad, device=torch.device("cpu"))
