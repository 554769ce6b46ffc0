"""Formulas against the model matrices of patsy, and what they keep of training."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from ibaml import MetaLearner
from ibaml.data.columns import fit_columns
from ibaml.data.formulas import Formula, encode_formula, fit_formula, read_formula

RNG = np.random.default_rng(0)


def table(num_rows=30, **columns):
    return pd.DataFrame(
        {
            "ses": RNG.normal(size=num_rows),
            "age": RNG.uniform(1, 9, num_rows),
            "sector": RNG.permutation(np.resize(["a", "b", "c"], num_rows)),
            "grade": RNG.permutation(np.resize([1, 2, 3], num_rows)),
        }
        | columns
    )


TRAIN, NEW = table(), table(8)


def fitted(text, train=TRAIN):
    formula = read_formula(text)
    columns = fit_columns(formula.variables, [("the table", train)], categories=formula.categories)
    return fit_formula(formula, columns, [("the table", train)]), columns


@pytest.mark.parametrize(
    "text",
    [
        "ses + C(sector)",
        "ses * sector",
        "C(grade) + ses:age",
        "0 + sector + age",
        "np.log(age) + I(age ** 2)",
        "center(age) + standardize(ses)",
        "C(sector, contr.sum) + ses",
        "bs(age, df=5, degree=3)",
    ],
)
def test_features_are_those_of_patsy_at_the_statistics_of_training(text):
    patsy = pytest.importorskip("patsy")
    formula, columns = fitted(text)
    theirs = text.replace("contr.sum", "Sum")
    design = patsy.dmatrix(theirs, TRAIN)
    stored = Formula.restore(json.loads(json.dumps(formula.settings())))
    # Splines end where training did.
    new = NEW.assign(age=NEW["age"].clip(TRAIN["age"].min(), TRAIN["age"].max()))
    for rows, matrix in ((TRAIN, design), (new, patsy.build_design_matrices([design.design_info], new)[0])):
        kept = [place for place, name in enumerate(design.design_info.column_names) if name != "Intercept"]
        expected = np.asarray(matrix)[:, kept]
        for each in (formula, stored):
            (found,) = encode_formula(each, columns, [("rows", rows)])
            # The two libraries have another order of terms.
            assert found.shape == expected.shape
            np.testing.assert_allclose(found[:, _order(found)], expected[:, _order(expected)], atol=1e-12)


def _order(matrix):
    return np.lexsort(np.round(matrix, 9))


def test_a_formula_is_read():
    formula = read_formula("score + rank ~ ses + C(grade):age + np.sqrt(age) + `late bus`")
    assert formula.targets == ("score", "rank")
    assert formula.variables == ("age", "grade", "late bus", "ses") and formula.categories == ("grade",)
    assert read_formula("ses").targets == ()


def test_several_tables_are_encoded_in_one_piece():
    formula, columns = fitted("ses + scale(age) + C(sector)")
    whole = encode_formula(formula, columns, [("all", TRAIN)])[0]
    parts = encode_formula(formula, columns, [("first", TRAIN[:4]), ("none", TRAIN[:0]), ("rest", TRAIN[4:])])
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert [len(part) for part in parts] == [4, 0, 26]
    # One row by itself, with one of three categories.
    np.testing.assert_array_equal(encode_formula(formula, columns, [("one", TRAIN[5:6])])[0], whole[5:6])


def test_gaps_in_numbers_are_filled_with_the_mean_of_training():
    train = TRAIN.assign(ses=TRAIN["ses"].where(TRAIN.index > 2))
    formula, columns = fitted("ses + age", train)
    (found,) = encode_formula(formula, columns, [("the table", train)])
    np.testing.assert_allclose(found[:3, 0], train["ses"].mean())
    assert found.shape == (30, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ses +", "formula 'ses +' cannot be read"),
        ("score ~ ses + (1 | school)", "each task has its own weights of all terms"),
        ("score ~ 1", "formula 'score ~ 1' names no column; expected at least one, such as 'score ~ ses'."),
        ("np.log(score) ~ ses", "has np.log(score) on its left-hand side; expected columns as they are: transform the"),
        ("ses ~ ses + age", "formula 'ses ~ ses + age' has ses on both sides: leave it out of one."),
        ("__import__('os')", "has '__import__', but a formula can only do arithmetic and call C, I, bs, cc"),
        ("np.load(ses)", "has 'np.load', but a formula can only do arithmetic"),
        ("I(ses.real)", "has 'ses.real', but a formula can only do arithmetic"),
        ("I([age for age in ses])", "but a formula can only do arithmetic"),
        ("I((lambda: 1)())", "but a formula can only do arithmetic"),
        ("lag(ses)", "has 'lag', but a formula can only do arithmetic"),
        ("np.log(`late bus`)", "which cannot be read: names with spaces stand for themselves only"),
    ],
)
def test_what_is_no_formula_of_columns_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_formula(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        Formula.restore({"text": text, "state": {"pairs": []}})


def test_a_formula_is_text():
    with pytest.raises(TypeError, match="formula must be text such as 'score ~ ses"):
        read_formula(["ses"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            NEW.assign(sector="d"),
            "column 'sector' of asked holds 'd', which training has not seen; a formula knows the",
        ),
        (NEW.assign(sector=None), "column 'sector' has missing values, and a formula needs a category in every row"),
        (NEW.assign(grade=9), "column 'grade' of asked holds '9', which training has not seen"),
        (NEW.assign(ses=-np.abs(NEW["ses"]), age=TRAIN["age"][:8]), "'np.log(ses)' of formula"),
        (NEW.drop(columns="grade"), "asked has no column grade; its columns are ses, age, sector."),
        (NEW.assign(age=99.0), "cannot be computed: "),
    ],
)
def test_rows_that_a_formula_does_not_know_are_refused(rows, message):
    train = TRAIN.assign(ses=TRAIN["ses"].abs() + 1)
    formula, columns = fitted("np.log(ses) + C(sector) + C(grade) + bs(age, df=4)", train)
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_formula(formula, columns, [("asked", rows)])


def test_a_constant_alone_and_what_cannot_be_stored_are_refused():
    formula, columns = fitted("ses")
    with pytest.raises(ValueError, match="has a constant alone: name at least one column"):
        encode_formula(formula._replace(text="1"), columns, [("the table", TRAIN)])
    with pytest.raises(
        ValueError, match="has a transformation that keeps a object of the training tasks, which cannot"
    ):
        formula._replace(state={"f": object()}).settings()


# The learner


def long_table(num_groups=14, num_rows=12):
    parts = []
    for number in range(num_groups):
        part = table(num_rows, school=f"s{number}")
        slope = 1 + 0.5 * RNG.normal()
        part["score"] = slope * part["ses"] + 2 * (part["sector"] == "b") + 0.1 * RNG.normal(size=num_rows)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


LONG = long_table()


def learner_of(formula, **how):
    return MetaLearner(likelihood="gaussian").fit(LONG, task="school", formula=formula, num_steps=5, **how)


def test_a_learner_takes_a_formula_and_keeps_it(tmp_path):
    learner = learner_of("score ~ scale(ses) + C(sector)")
    assert learner.fitted_model.preprocessing.input_shape == (3,)
    loaded = MetaLearner.load(learner.save(tmp_path / "model"))
    stored = json.loads((tmp_path / "model" / "model.json").read_text())["preprocessing"]["formula"]
    assert stored["text"] == "score ~ scale(ses) + C(sector)"
    rows = long_table(3)
    known, asked = rows[rows.index % 2 == 0], rows[rows.index % 2 == 1]
    first_known, first_asked = (part[part["school"] == "s0"] for part in (known, asked))
    means = []
    for each in (learner, loaded):
        means.append(each.adapt(first_known, first_known["score"]).predict(first_asked).mean)
        found = each.predict_new(known, asked)
        np.testing.assert_allclose(found.mean[: len(means[-1])], means[-1], rtol=1e-5)
        assert each.evaluate(rows)["nll"].mean < 10
    np.testing.assert_array_equal(*means)
    assert np.corrcoef(means[0], first_asked["score"])[0, 1] > 0.8


def test_the_features_are_those_that_one_would_write_out():
    by_hand = LONG.assign(
        b=(LONG["sector"] == "b") * 1.0, c=(LONG["sector"] == "c") * 1.0, product=LONG["ses"] * LONG["age"]
    )
    learner = learner_of("score ~ C(sector) + ses:age")
    other = MetaLearner(likelihood="gaussian").fit(
        by_hand, task="school", target="score", features=["b", "c", "product"], num_steps=5
    )
    some = by_hand[:8]
    first, second = (each.adapt(some, some["score"]).predict(by_hand[8:12]) for each in (learner, other))
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-5)


def test_the_target_may_be_named_beside_a_formula():
    learner = MetaLearner(likelihood="gaussian").fit(
        LONG, task="school", target="score", formula="ses", num_steps=1, validation_tasks=0.2
    )
    assert learner.fitted_model.preprocessing.target_columns == ("score",)
    two = LONG.assign(rank=LONG["score"] * 2)
    both = MetaLearner(likelihood="gaussian").fit(two, task="school", formula="score + rank ~ ses", num_steps=1)
    assert both.adapt(two[:5], two[:5][["score", "rank"]]).predict(two[5:7]).mean.shape == (2, 2)


@pytest.mark.parametrize(
    ("tasks", "how", "error", "message"),
    [
        (
            LONG,
            {"formula": "score ~ ses", "features": ["age"]},
            ValueError,
            "features and formula 'score ~ ses' both name",
        ),
        (
            LONG,
            {"formula": "score ~ ses", "target": "age"},
            ValueError,
            "target is 'age', but the left-hand side of formula",
        ),
        (
            LONG,
            {"formula": "ses"},
            ValueError,
            "formula 'ses' has no left-hand side: write 'target ~ ...', or give target=",
        ),
        (
            [([[1.0]], [1.0])],
            {"formula": "ses"},
            TypeError,
            "formula names columns of a table such as a pandas DataFrame",
        ),
        (LONG, {"formula": "score ~ missing"}, ValueError, "the table has no column missing"),
    ],
)
def test_formulas_that_do_not_fit_the_data_are_refused(tasks, how, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MetaLearner(likelihood="gaussian").fit(tasks, task="school", num_steps=1, **how)


def test_arrays_are_refused_by_a_model_of_a_formula():
    learner = learner_of("score ~ ses + age")
    with pytest.raises(
        TypeError, match=re.escape("but the model was trained on the formula 'score ~ ses + age': pass a")
    ):
        learner.adapt(np.zeros((3, 2)), np.zeros(3))
