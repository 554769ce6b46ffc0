"""The tab *Table*: rows of many groups in, intervals for the rows whose target is missing, and what to measure next."""

import functools
import io
import math
from typing import Any

import numpy as np

from ibaml.learner import MetaLearner
from ibaml.likelihoods import MixturePrediction
from ibaml.optional import require
from ibaml.playground.requests import Answered, Asked, field

LEAST_GROUPS, MOST_ROWS = 5, 20_000
LEVEL = 0.9
SEPARATORS = ",;\t"


def answer(asked: Asked) -> Answered:
    """Learns from the groups whose targets are all known, and predicts the missing ones of the others.

    Args:
        asked: ``csv``, a table with a header; ``group`` and ``target``, the names of two columns. Empty names are
            guessed: the first column that repeats itself and holds no fractions, and the last one.

    Returns:
        ``columns``, ``group`` and ``target``: as they are or were guessed; ``learned_from``: the number of complete
        groups; ``choice``: which model held-out groups chose; ``answers``: for each missing target the group, the
        inputs, the mean, the ends of the interval, and by how much a measurement there would lower the variance of all
        missing ones of its group; ``next``: for each group the position in ``answers`` of the row to measure next.

    Raises:
        ImportError: If pandas is not installed.
        ValueError: If the table cannot be read, a column is missing, or there are too few groups.
    """
    text, group, target = (field(asked, name, str) for name in ("csv", "group", "target"))
    whole = read_csv(text)
    group, target = group or guess_group(whole), target or str(whole.columns[-1])
    chosen: Answered = {"columns": [*whole.columns], "group": group, "target": target}
    _check(whole, group, target)
    is_asked = whole[target].isna()
    incomplete = is_asked.groupby(whole[group]).transform("any")
    names = whole.loc[~incomplete, group].nunique()
    if names < LEAST_GROUPS:
        raise ValueError(
            f"{names} groups of {group!r} have every {target!r}; expected at least {LEAST_GROUPS}, to learn from what "
            "groups are like."
        )
    if not is_asked.any():
        raise ValueError(
            f"no {target!r} is missing, so that there is nothing to predict: leave it empty in the rows that you ask "
            "for."
        )
    learner = _fit(whole[~incomplete].to_csv(index=False), group, target)
    new = whole[incomplete]
    answers, first = _predict(learner, new[new[target].notna()], new[new[target].isna()], group, target)
    return {
        **chosen,
        "learned_from": names,
        "choice": "" if learner.choice is None else str(learner.choice),
        "answers": answers,
        "next": first,
    }


def read_csv(text: str) -> Any:
    """Returns a pasted table as a DataFrame.

    Commas, semicolons or tabs separate columns: whichever the header has most of.

    Raises:
        ImportError: If pandas is not installed.
        ValueError: If it is empty, no table, or too long.
    """
    pandas = require("pandas", "pandas", "playground")
    if not text.strip():
        raise ValueError("the table is empty: paste one with a header, or choose a CSV file.")
    header = text.strip().splitlines()[0]
    separator = max(SEPARATORS, key=header.count)
    try:
        whole = pandas.read_csv(io.StringIO(text.strip()), sep=separator, skipinitialspace=True)
    except ValueError as error:
        raise ValueError(f"this cannot be read as a table: {error}") from error
    if len(whole.columns) < 3:
        raise ValueError(
            f"the table has {len(whole.columns)} column(s) ({', '.join(map(str, whole.columns))}); expected at least "
            "three, separated by commas: the group, an input and the target."
        )
    if len(whole) > MOST_ROWS:
        raise ValueError(f"the table has {len(whole):,} rows; expected at most {MOST_ROWS:,}: take a part of it.")
    return whole


def guess_group(whole: Any) -> str:
    """Returns the first column whose values repeat and have no fractions; the first column if there is none."""
    for name in whole.columns:
        values = whole[name]
        repeats = values.nunique() <= len(values) / 2
        if repeats and values.dtype.kind != "f":
            return str(name)
    return str(whole.columns[0])


def _check(whole: Any, group: str, target: str) -> None:
    for role, name in (("group", group), ("target", target)):
        if name not in whole.columns:
            raise ValueError(f"the {role} is {name!r}, but the columns are {', '.join(map(str, whole.columns))}.")
    if group == target:
        raise ValueError(f"group and target are both {group!r}; expected two columns.")
    if whole[target].dtype.kind not in "iufb":
        value = next(value for value in whole[target].dropna() if not isinstance(value, int | float))
        raise ValueError(
            f"the target {target!r} holds {value!r}; expected numbers, and nothing in the rows that you ask for. "
            "Classes are for Python: fit(table, task=..., target=...)."
        )
    if whole[group].isna().any():
        row = int(np.flatnonzero(whole[group].isna())[0]) + 1
        raise ValueError(f"row {row} has no {group!r}; expected the name of its group.")


@functools.lru_cache(maxsize=8)
def _fit(text: str, group: str, target: str) -> MetaLearner:
    """Fits once for each table: asking again is usual, other targets of the same groups are not."""
    pandas = require("pandas", "pandas", "playground")
    table = pandas.read_csv(io.StringIO(text))
    return MetaLearner(likelihood="gaussian").fit(table, 0.2, task=group, target=target)


def _predict(
    learner: MetaLearner, known: Any, asked: Any, group: str, target: str
) -> tuple[list[Answered], dict[str, int]]:
    prediction = learner.predict_new(known, asked)
    assert isinstance(prediction, MixturePrediction)
    lower, upper = prediction.interval(LEVEL)
    inputs = [name for name in asked.columns if name not in (group, target)]
    # Positions count from here on, whatever the labels of the rows were.
    asked = asked.reset_index(drop=True)
    gains = np.zeros(len(asked))
    first: dict[str, int] = {}
    for name, rows in asked.groupby(group, sort=False):
        own = known[known[group] == name]
        chosen = learner.adapt(own, own[target]).acquisition(rows)
        gains[rows.index] = chosen.scores
        first[str(name)] = int(rows.index[int(chosen.positions[0])])
    answers = [
        {
            "group": str(asked[group].iloc[row]),
            "inputs": {str(name): _plain(asked[name].iloc[row]) for name in inputs},
            "mean": float(prediction.mean[row]),
            "lower": float(lower[row]),
            "upper": float(upper[row]),
            "gain": float(gains[row]),
        }
        for row in range(len(asked))
    ]
    return answers, first


def _plain(value: Any) -> Any:
    """Returns a cell as JSON has it; a gap is None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value
