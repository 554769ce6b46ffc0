"""The page of an evaluation, and the README beside the model: what they name and show is there."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ibaml import MetaLearner
from ibaml.learner.evaluations import read_evaluation
from ibaml.learner.report import write_report
from ibaml.recipes import runs


class Page(HTMLParser):
    """Collects the cells and pictures of a page, and what would have to be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[bytes] = []
        self.fetched: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "img":
            kind, data = found["src"].split(",")
            assert kind == "data:image/png;base64" and found["alt"]
            self.pictures.append(base64.b64decode(data))
        self.fetched += [value for name, value in attrs if name in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "td":
            self.cells.append(data)


def table(num_groups: int, seed: int, *, classes: bool) -> pd.DataFrame:
    """Returns groups of unequal sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 14, num_groups)
    group, x = np.arange(num_groups).repeat(sizes), rng.normal(size=sizes.sum())
    y = rng.normal(2, 0.5, num_groups).repeat(sizes) * x + rng.normal(0, 0.1, len(x))
    return pd.DataFrame(
        {"group": [f"g{number}" for number in group], "x": x, "y": np.where(y > 0, "<b>", "a") if classes else y}
    )


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "classes"])
def evaluated(request, tmp_path_factory):
    """A saved model of a table, evaluated on groups of unequal sizes."""
    folder = tmp_path_factory.mktemp("model")
    learner = MetaLearner(likelihood="categorical" if request.param else "gaussian")
    learner.fit(table(12, 0, classes=request.param), task="group", target="y", num_steps=2).save(folder)
    table(7, 1, classes=request.param).to_csv(folder / "test.csv", index=False)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "example_task.png").write_bytes(b"of an evaluation before this one")
    runs.evaluate_run(folder, test=folder / "test.csv")
    return folder, {"reliability.png", "selective.png"} if request.param else {"quantiles.png"}


def test_the_page_has_every_score_and_picture_in_it(evaluated):
    folder, expected = evaluated
    page, stored = Page(folder / "evaluation" / "report.html"), read_evaluation(folder)
    pictures = {path.name for path in (folder / "evaluation").glob("*.png")}
    assert pictures == expected, "those of this evaluation, none of the one before"
    assert {*page.pictures} == {(folder / "evaluation" / name).read_bytes() for name in pictures}
    assert page.fetched == [], "one file that needs no other"
    for name, value in stored.report.items():
        assert name in page.cells and f"{value.mean:.4f}" in page.cells and f"± {value.half_width:.4f}" in page.cells
    assert all(re.search("[a-z] [a-z]", text) for text in page.cells if not re.match(r"[\w±. -]+$", text)), page.cells


def test_the_page_shows_the_worst_tasks_first(evaluated):
    folder, _ = evaluated
    nll = read_evaluation(folder).per_task["nll"]
    worst = Page(folder / "evaluation" / "report.html").cells
    row = worst[worst.index(str(int(nll.argmax()))) :]
    assert f"{float(nll.max()):.4f}" in row


def test_the_readme_shows_pictures_that_exist(evaluated):
    folder, expected = evaluated
    text = (folder / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[\w+\]\(([^)]+)\)", text)
    assert shown == sorted(f"evaluation/{name}" for name in expected)
    assert all((folder / name).is_file() for name in shown)


def test_a_model_without_evaluation_has_no_page(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not been evaluated: run `ibaml evaluate"):
        write_report(tmp_path)
