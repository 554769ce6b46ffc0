"""The pages for users run as written: Python blocks in one namespace, shell blocks through the command line."""

import re
import shlex
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ibaml import MetaLearner
from ibaml.cli import main

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(python|bash)\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def run(page: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for language, code in blocks(page):
        if language == "python":
            exec(code, names)
        else:
            for line in code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "ibaml"
                with pytest.raises(SystemExit) as caught:
                    main(arguments)
                assert caught.value.code == 0
    return names


@pytest.fixture
def few_steps(monkeypatch):
    original = MetaLearner.fit
    monkeypatch.setattr(MetaLearner, "fit", lambda self, *a, **k: original(self, *a, **{**k, "num_steps": 3}))


def test_quick_start(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("quickstart.md")
    assert names["prediction"].classes.tolist() == ["active", "inactive"]
    np.testing.assert_allclose(names["prediction"].probs.sum(1), 1, rtol=1e-5)
    assert names["posterior"].num_support == 10
    assert (tmp_path / "my_model" / "model.json").is_file()


def test_the_quick_start_is_at_most_ten_lines():
    code = next(code for _, code in blocks("quickstart.md") if "MetaLearner" in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
def test_the_quick_start_in_full_takes_less_than_a_minute_and_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    names = run("quickstart.md")
    assert time.process_time() - start < 60
    report = names["learner"].evaluate([names["make_task"]() for _ in range(60)])
    # Chance is log 2 = 0.693; the share of examples in the more frequent class of a task is some 0.6.
    assert report["nll"].mean < 0.55 and report["accuracy"].mean > 0.72


def test_how_to_table(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("howto-table.md")
    written = pd.read_csv(tmp_path / "predicted.csv")
    np.testing.assert_allclose(written.predicted, names["prediction"].mean)
    np.testing.assert_allclose(written.lower_90, names["lower"])
    assert len(written) == 15
