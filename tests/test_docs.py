"""The pages for users run as written: Python blocks in one namespace, shell blocks through the command line."""

import dataclasses
import pkgutil
import re
import runpy
import shlex
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ibaml
from ibaml import MetaLearner
from ibaml.cli import main
from ibaml.learner import defaults, held_out
from ibaml.train import temperature

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


NUM_TASKS = 5
"""Tasks of an evaluation under ``few_steps``."""


@pytest.fixture
def few_steps(monkeypatch):
    """Three meta-steps, two tasks to validate on, the first five tasks of an evaluation, five steps of Adam."""
    fit, evaluate, convex_algorithm = MetaLearner.fit, held_out.evaluate, defaults.convex_algorithm

    def short_fit(self, *tasks, settings=None, **how):
        if settings is not None:
            settings = dataclasses.replace(settings, num_validation_tasks=2)
        return fit(self, *tasks, settings=settings, **{**how, "num_steps": 3})

    def short_evaluate(fitted, tasks, *, num_tasks=None, **how):
        return evaluate(fitted, tasks, num_tasks=min(num_tasks or len(tasks), NUM_TASKS), **how)

    def short_algorithm(*arguments, **settings):
        algorithm = convex_algorithm(*arguments, **settings)
        if hasattr(algorithm, "inner"):
            algorithm = dataclasses.replace(algorithm, inner=dataclasses.replace(algorithm.inner, num_steps=5))
        return algorithm

    monkeypatch.setattr(MetaLearner, "fit", short_fit)
    monkeypatch.setattr(held_out, "evaluate", short_evaluate)
    monkeypatch.setattr(temperature, "LEAST_TASKS", NUM_TASKS)
    monkeypatch.setattr(defaults, "convex_algorithm", short_algorithm)
    monkeypatch.setattr(defaults, "TABLE_TRAINER", dataclasses.replace(defaults.TABLE_TRAINER, num_validation_tasks=2))


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
def test_the_quick_start_in_full_takes_less_than_a_minute_and_predicts_well(tmp_path, monkeypatch):
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
    by_school = names["several"].groupby("school")
    assert len(names["asked"]) == len(names["several"]) - 5 * len(by_school)
    assert (names["unknown"].epistemic > names["predicted"].epistemic).all()
    assert names["curve"].num_support == (0, 1, 2, 5) and (tmp_path / "how_many.png").is_file()
    assert names["further"].mean() > names["elsewhere"].mean()


def test_how_to_regression(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("howto-regression.md")
    assert (names["lower"] < names["prediction"].mean).all() and (names["prediction"].mean < names["upper"]).all()
    assert names["posterior"].num_support == 8 and names["curves"].shape == (64, 101)
    # What was saved and loaded, and adapted at once, is near what was updated.
    assert np.corrcoef(names["again"].mean, names["later"].mean)[0, 1] > 0.99
    assert names["folder"] == Path("cells_model")


# BoTorch says so of one of its restarts, and starts anew.
@pytest.mark.filterwarnings("ignore:Optimization failed in `gen_candidates_scipy`:RuntimeWarning")
def test_what_to_measure_next_and_learning_on(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("howto-online.md")
    assert names["posterior"].num_support == 9 and len(names["yields"]) == 9
    low, high = names["bounds"].numpy()
    assert (names["plots"][6:] >= low).all() and (names["plots"][6:] <= high).all()
    assert names["learner"].fitted_model.experience.num_tasks == 48 + 30


def test_from_mixed_models(capsys):
    names = run("from-mixed-models.md")
    assert names["learner"].choice.name == defaults.CORRELATED
    told = re.findall(r"(\d) known: (\d+) ms, 90% in (\d+) to (\d+)", capsys.readouterr().out)
    widths = [int(high) - int(low) for _, _, low, high in told]
    assert [known for known, *_ in told] == ["0", "1", "3", "9"] and widths == sorted(widths, reverse=True)
    # Those that made the table, in units of its columns.
    deviation = names["deviation"].numpy() * float(names["learner"].preprocessing.targets.scale)
    slope = deviation[0] / float(names["learner"].preprocessing.inputs.scale[0])
    assert slope == pytest.approx(35**0.5, rel=0.4)
    assert len(names["prediction"].mean) == 35


def test_from_gaussian_processes():
    names = run("from-gaussian-processes.md")
    assert names["learner"].choice.name in (defaults.CURVES, defaults.LEARNED_CURVES)
    assert names["curves"].shape[1] == 50
    truth = names["prediction"].mean
    assert np.isfinite(truth).all() and (names["lower"] < names["upper"]).all()


def test_uncertainty(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("uncertainty.md")
    assert names["probs"].shape == (30, 30, 3) and names["learner"].calibration_temperature != 1


def test_choosing(few_steps):
    names = run("choosing.md")
    assert names["nll"].keys() == {"ibaml", "maml"} and len(names["nll"]["maml"]) == NUM_TASKS


def test_gallery(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("gallery.md")
    assert names["curves"].keys() == {"as trained", "after calibrate"}
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    # Those that the page shows, and the repository has, are those that it draws.
    assert drawn == {path.name for path in (DOCS / "images").glob("gallery_*.png")}
    assert drawn == set(re.findall(r"\(images/(gallery_\w+\.png)\)", (DOCS / "gallery.md").read_text()))


def test_compare(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("compare.md")
    assert [row[0] for row in names["table"].rows] == ["learner", "ridge", "neighbours", "pooled"]
    assert (tmp_path / "runs/mine/baselines/comparison.md").is_file()


def test_from_maml(few_steps):
    names = run("from-maml.md")
    assert names["posterior"].value.keys() == dict(names["model"].named_parameters()).keys()
    assert names["default"].meta_parameters.prior is not None


def test_from_easyfsl(few_steps):
    names = run("from-easyfsl.md")
    assert names["prediction"].probs.shape == (12, 3)


def test_from_setfit(tmp_path, monkeypatch, few_steps):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    names = run("from-setfit.md")
    assert names["prediction"].probs.shape == (24, 3) and len(names["prediction"].out_of_task) == 24


def test_faq():
    assert run("faq.md")["refused"]


def test_how_to_images(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("howto-images.md")
    assert names["prediction"].probs.shape == (15, 3) and names["known"].images.shape == (9, 1, 16, 16)
    written = pd.read_csv(tmp_path / "predicted.csv")
    assert written.predicted.isin(names["prediction"].classes).all() and len(written) == 15


def test_how_to_network(tmp_path, monkeypatch, few_steps):
    monkeypatch.chdir(tmp_path)
    names = run("howto-network.md")
    assert all("lora" in name for name in names["learner"].model.adapted)
    assert sorted(names["learner"].model.shared) == ["head.bias", "head.weight"]
    assert len(names["learner"].model.frozen) == 4


def test_how_to_text(tmp_path, monkeypatch, few_steps):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    names = run("howto-text.md")
    assert names["prediction"].probs.shape == (20, 4) and names["prediction"].classes.tolist()[0] == "new-0"
    assert set(names["tuned"].model.shared) == {"backbone.layers.1.weight", "backbone.layers.1.bias"}


def test_how_to_molecules(tmp_path, monkeypatch, few_steps):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    names = run("howto-molecules.md")
    assert (names["low"] < names["high"]).all() and len(names["high"]) == 24
    assert names["learner"].backbone.name == "log counts and descriptors, 1"


def test_how_to_tuning():
    names = run("howto-tuning.md")
    assert names["info"].linear_residual < 1e-6


def test_how_to_extend():
    names = run("howto-extend.md")
    assert all(found == {} for found in names["found"].values()) and len(names["found"]) == 6
    assert names["learner"].training_result.num_steps == 3


def test_how_to_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("howto-training.md")
    assert names["resumed"].training_result.num_steps == 6
    assert (tmp_path / "runs" / "mine" / "evaluation").is_dir()


def test_method():
    assert run("method.md")["info"].inner_grad_norm < 1e-6


def test_design():
    """The erratum that the page checks."""
    assert callable(run("design.md")["slope"])


def test_tour(few_steps):
    assert run("tour.md")["prediction"].mean.shape == (7,)


def test_every_page_with_code_is_run():
    """A page whose blocks no test runs would rot."""
    tests = Path(__file__).read_text()
    assert [page.name for page in DOCS.glob("*.md") if blocks(page.name) and f'run("{page.name}")' not in tests] == []


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text().split("nav:")[1]
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))


def test_the_api_page_has_every_module_once():
    hook = runpy.run_path(str(DOCS / "hooks" / "api.py"))
    shown = re.findall(r"^::: (\S+)$", hook["sections"](), re.MULTILINE)
    assert hook["MARKER"] in (DOCS / "api.md").read_text()
    modules = (info.name for info in pkgutil.walk_packages(ibaml.__path__, "ibaml."))
    assert sorted(shown) == sorted(name for name in modules if not name.endswith(".__main__"))


def test_the_tour_names_files_and_names_that_are_there():
    text = (DOCS / "tour.md").read_text()
    source = Path(ibaml.__file__).parent
    files = {path for path in re.findall(r"`([\w/]+(?:\.py|/))`", text) if not (source / path).exists()}
    assert files == set()
    code = "\n".join(path.read_text() for path in source.rglob("*.py"))
    names = set(re.findall(r"`(?:\w+\.)?([A-Za-z_]\w+)`", text)) - {"py", "train"}
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
    assert len(text.splitlines()) <= 120
