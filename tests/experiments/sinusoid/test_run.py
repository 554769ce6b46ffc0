"""One small experiment is run, and every number of it computed again by other means."""

import csv
import dataclasses
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from ibaml.experiments.report import Place
from ibaml.experiments.sinusoid import run as sinusoid
from ibaml.experiments.sinusoid.report import rows, summary
from ibaml.experiments.sinusoid.run import LEVELS, REFERENCE, SinusoidResult, SinusoidRun, SinusoidSettings
from ibaml.learner import MetaLearner
from ibaml.learner.evaluations import read_evaluation
from ibaml.priors import DiagonalGaussian
from ibaml.recipes import Recipe, get_recipe, runs
from ibaml.train.evaluate import draw_tasks
from ibaml.types import Batch

# Short inner problems and validations; what a recipe's own settings find is no matter for a test.
SMALL = {
    "algorithm.inner.num_steps": 2,
    "algorithm.inner.learning_rate": 0.001,
    "trainer.tasks_per_step": 3,
    "trainer.num_steps": 2,
    "trainer.num_validation_tasks": 2,
    "data.num_test_queries": 20,
}


def small_recipe(name: str) -> Recipe:
    recipe = get_recipe(name).replace(SMALL)
    samples = {"algorithm.num_samples": 1, "algorithm.num_evaluation_samples": 4}
    return recipe.replace(samples) if recipe.algorithm.is_bayesian else recipe


def small_settings(**changes: object) -> SinusoidSettings:
    values = {"shots": (5,), "algorithms": ("maml", "ibaml"), "inner_steps": (1, 3), "num_tasks": 6, "num_examples": 2}
    return SinusoidSettings(**{**values, **changes})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[SinusoidResult, SinusoidResult, Path]:
    """The results of a first call, which time stops after one meta-step, and of a second, which finishes."""
    folder = tmp_path_factory.mktemp("sinusoid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinusoid, "get_recipe", small_recipe)
        stopped = sinusoid.run(small_settings(max_minutes=1e-9), Place(folder))
        finished = sinusoid.run(small_settings(), Place(folder))
    return stopped, finished, folder


@pytest.fixture(scope="module")
def result(outcome: tuple[SinusoidResult, SinusoidResult, Path]) -> SinusoidResult:
    return outcome[1]


def bayesian_run(result: SinusoidResult) -> SinusoidRun:
    return result.runs[1]


def test_a_stopped_run_is_resumed_in_its_folder(outcome: tuple[SinusoidResult, SinusoidResult, Path]) -> None:
    stopped, finished, folder = outcome
    assert [one.trained.num_steps for one in stopped.runs] == [1, 1]
    assert [one.trained.num_steps for one in finished.runs] == [2, 2]
    assert [str(one.trained.folder.relative_to(folder / "runs")) for one in finished.runs] == [
        "sinusoid_5shot_maml",
        "sinusoid_5shot_ibaml",
    ]
    assert all(
        second.trained.seconds > first.trained.seconds > 0
        for first, second in zip(stopped.runs, finished.runs, strict=True)
    )
    for one in finished.runs:
        assert one.trained.best_step == MetaLearner.load(one.trained.folder).fitted_model.step
    unfinished = "**Training is not finished**: sinusoid_5shot_maml, sinusoid_5shot_ibaml."
    assert unfinished in summary(stopped)
    assert "not finished" not in summary(finished)


def test_each_number_of_inner_steps_is_that_of_an_evaluation_with_it(result: SinusoidResult) -> None:
    for one in result.runs:
        assert [point.num_inner_steps for point in one.points] == [1, 2, 3]
        for point in one.points:
            recipe = one.recipe.replace({"algorithm.inner.num_steps": point.num_inner_steps})
            again = runs.evaluate_run(one.trained.folder, num_tasks=6, seed=0, recipe=recipe).evaluation
            assert point.mse == again.report["mse"]
            assert point.mse.num_tasks == 6
            if one.recipe.algorithm.is_bayesian:
                assert point.nll == again.report["nll"]
        assert len({point.mse.mean for point in one.points}) == 3


def test_the_run_folder_keeps_the_evaluation_with_the_steps_of_training(
    outcome: tuple[SinusoidResult, SinusoidResult, Path],
) -> None:
    for one in outcome[1].runs:
        # The test above may have left another one.
        runs.evaluate_run(one.trained.folder, num_tasks=6, seed=0)
        assert one.own_point.num_inner_steps == 2
        assert read_evaluation(one.trained.folder).report["mse"].mean == pytest.approx(
            one.own_point.mse.mean, rel=1e-12
        )


def test_intervals_are_those_of_the_predictive_mean_and_variance(result: SinusoidResult) -> None:
    one = bayesian_run(result)
    evaluation = runs.evaluate_run(one.trained.folder, num_tasks=6, seed=0).evaluation
    assert evaluation.mean is not None and evaluation.variance is not None
    mean, deviation = evaluation.mean.numpy()[..., 0], np.sqrt(evaluation.variance.numpy()[..., 0])
    error = np.abs(mean - evaluation.targets.numpy()[..., 0])
    for level in LEVELS:
        radius = NormalDist().inv_cdf(0.5 + level / 2) * deviation
        assert one.own_point.coverage[level].mean == pytest.approx((error <= radius).mean(), abs=1e-12)
        assert one.own_point.width[level].mean == pytest.approx(2 * radius.mean(), rel=1e-12)
        of_tasks = 2 * radius.mean(-1)
        # Student's 97.5% quantile at five degrees of freedom.
        half_width = 2.570582 * of_tasks.std(ddof=1) / 6**0.5
        assert one.own_point.width[level].half_width == pytest.approx(half_width, rel=1e-5)


def test_plain_weights_make_no_statement_about_the_error(result: SinusoidResult) -> None:
    one = result.runs[0]
    assert one.examples == ()
    for point in one.points:
        assert point.nll is None and not point.coverage and not point.width


def test_examples_are_the_first_test_tasks_before_and_after_adaptation(result: SinusoidResult) -> None:
    one = bayesian_run(result)
    learner = MetaLearner.load(one.trained.folder)
    model, meta = learner.model, learner.meta_parameters
    sampler = one.recipe.data.sampler("test")
    tasks = draw_tasks(sampler, 0, 2, seed=0)
    assert len(one.examples) == 2
    noise_variance = meta.shared["likelihood.log_noise_variance"].exp()
    assert isinstance(meta.prior, DiagonalGaussian)
    center = meta.prior.mean
    for index, example in enumerate(one.examples):
        x = example.task.query.x
        assert torch.equal(x, tasks.query.x[index].sort(0).values)
        order = tasks.query.x[index, :, 0].argsort()
        assert torch.equal(example.task.query.y, tasks.query.y[index][order])
        assert torch.equal(example.task.support.x, tasks.support.x[index])
        for mean, variance in (
            (example.prior_mean, example.prior_variance),
            (example.mean, example.variance),
        ):
            assert mean.shape == variance.shape == (20, 1)
            assert bool((variance >= noise_variance).all())
        # The prior of a barely trained run is narrow: its samples stay near the network of its mean.
        spread = (example.prior_variance - noise_variance).sqrt()
        outputs = model.outputs(center, meta.shared, x).detach()
        assert bool(((example.prior_mean - outputs).abs() <= 4 * spread + 1e-5).all())
        # One inner problem, solved by hand: gradient descent lowers the support loss.
        support = Batch(tasks.support.x[index], tasks.support.y[index])
        before = model.per_example(center, meta.shared, support).mean()
        posterior = learner.adapt(*support).value
        assert float(model.per_example(posterior.mean, meta.shared, support).mean()) < float(before)
        adapted = model.outputs(posterior.mean, meta.shared, x).detach()
        assert (adapted - example.mean).square().mean() < (outputs - example.mean).square().mean()


def test_rows_hold_every_point_with_the_reference_beside_it(result: SinusoidResult, tmp_path: Path) -> None:
    found = rows(result)
    assert len(found) == 6
    assert all(row.keys() == found[0].keys() for row in found)
    first, last = found[0], found[-1]
    assert (first["algorithm"], first["num_shots"], first["num_inner_steps"]) == ("maml", 5, 1)
    assert (first["meta_steps"], first["meta_steps_planned"], first["tasks_per_meta_step"]) == (2, 2, 3)
    assert first["reference_maml_mse"] == 0.55
    assert first["temperature"] is None and first["nll"] is None and first["coverage_90_low"] is None
    point = bayesian_run(result).points[-1]
    assert (last["num_inner_steps"], last["num_inner_steps_in_training"]) == (3, 2)
    assert last["reference_maml_mse"] is None
    assert last["temperature"] == bayesian_run(result).recipe.algorithm.temperature
    assert (last["mse"], last["mse_low"], last["mse_high"]) == (point.mse.mean, point.mse.low, point.mse.high)
    assert last["coverage_95"] == point.coverage[0.95].mean
    assert last["width_50_high"] == point.width[0.5].high
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerows(found)
    with path.open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["mse"]) == point.mse.mean


def test_the_summary_names_what_was_done_and_the_reference(result: SinusoidResult) -> None:
    text = summary(result)
    maml, ibaml = result.runs
    assert f"| MAML | {maml.points[0].mse:.3f} | {maml.points[1].mse:.3f} |" in text
    assert "| reference (MAML) | 0.55 | - | - | - | 70,000 | - | - |" in text
    assert "| 2 of 2 |" in text
    covered, width = ibaml.points[0].coverage[0.5], ibaml.points[0].width[0.5]
    inside = f"{100 * covered.mean:.1f} +- {100 * covered.half_width:.1f}"
    assert f"| iBaML | 1 | {ibaml.points[0].nll:.3f} | {inside} | {width:.2f} |" in text
    assert text.count("| MAML |") == 1
    assert f"temperature {ibaml.recipe.algorithm.temperature:g}" in text
    assert "6 test tasks (seed 0) of 20 query points" in text
    assert f"- sinusoid_5shot_maml: {maml.recipe.algorithm.describe()}; likelihood" in text
    assert "1 weight sample in training and 4 in prediction" in text


def test_the_recipes_are_the_named_ones_and_steps_can_be_changed() -> None:
    settings = SinusoidSettings()
    names = [f"sinusoid_{shots}shot_{name}" for shots in (5, 10) for name in ("maml", "abml", "ibaml")]
    assert settings.recipes() == [get_recipe(name) for name in names]
    shorter = SinusoidSettings(num_steps=7).recipes()
    assert [recipe.trainer.num_steps for recipe in shorter] == [7] * 6
    assert shorter[0] == get_recipe(names[0]).replace({"trainer.num_steps": 7})


@pytest.mark.parametrize("num_shots", REFERENCE)
def test_maml_has_the_settings_of_its_publication(num_shots: int) -> None:
    recipe = get_recipe(f"sinusoid_{num_shots}shot_maml")
    model = recipe.learner().model
    assert {name: tuple(value.shape) for name, value in model.adapted.items()} == {
        "features.0.weight": (40, 1),
        "features.0.bias": (40,),
        "features.3.weight": (40, 40),
        "features.3.bias": (40,),
        "head.weight": (1, 40),
        "head.bias": (1,),
    }
    # The paper's inner step is one of size 0.01 on the mean squared error.
    task = draw_tasks(recipe.data.sampler("train"), 0, 1, seed=0)
    support = Batch(task.support.x[0], task.support.y[0])
    assert len(support.x) == num_shots

    def squared_error(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return ((torch.func.functional_call(model.network, weights, (support.x,)) - support.y) ** 2).mean()

    gradient = torch.func.grad(squared_error)(model.adapted)
    meta = recipe.algorithm.init(model.adapted, model.shared, generator=torch.Generator())
    noise = recipe.algorithm.draw_noise(meta, generator=torch.Generator())
    adapted = recipe.algorithm.adapt(model, meta, support, noise).value
    for name, value in adapted.items():
        torch.testing.assert_close(value, model.adapted[name] - 0.01 * gradient[name], rtol=1e-5, atol=1e-5)
    assert recipe.algorithm.inner.num_steps == 1
    assert (recipe.trainer.tasks_per_step, recipe.trainer.learning_rate) == (25, 1e-3)
    assert (recipe.trainer.num_steps, recipe.trainer.schedule) == (70_000, "constant")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": ()}, "shots must be one or more different values, but is ()."),
        ({"shots": (5, 5)}, "shots must be one or more different values, but is (5, 5)."),
        ({"shots": (0,)}, "shots must be numbers of at least 1, but is (0,)."),
        ({"shots": (5, 3)}, "shots has 3; there are recipes for 5, 10."),
        ({"algorithms": ()}, "algorithms must be one or more different values, but is ()."),
        ({"algorithms": ("mamlet",)}, "algorithms names 'mamlet'; there are recipes of abml, ibaml, maml."),
        ({"inner_steps": (0, 1)}, "inner_steps must be numbers of at least 1, but is (0, 1)."),
        ({"num_steps": 0}, "num_steps must be at least 1, but is 0."),
        ({"max_minutes": 0.0}, "max_minutes must be positive, but is 0.0."),
        ({"num_tasks": 1}, "num_tasks must be at least 2, for an interval over tasks, but is 1."),
        ({"num_examples": -1}, "num_examples must be at least 0, but is -1."),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_settings(**changes)


def test_cuda_where_there_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but this torch finds no CUDA device"):
        sinusoid.run(small_settings(device="cuda"), Place(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_settings_is_refused(outcome: tuple[SinusoidResult, SinusoidResult, Path]) -> None:
    with pytest.raises(ValueError, match="was trained with other settings"):
        sinusoid.run(small_settings(algorithms=("maml",)), Place(outcome[2]))


def test_an_interruption_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        stop_reason = "interrupted"

    monkeypatch.setattr(runs, "train_run", lambda *_, **__: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        sinusoid.run(small_settings(), Place(tmp_path))


def test_more_steps_than_in_training_may_diverge_and_cost_only_that_point(
    outcome: tuple[SinusoidResult, SinusoidResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_run = runs.evaluate_run
    asked: list[int] = []

    def diverging(folder: Path, **arguments: Any) -> runs.EvaluatedRun:
        asked.append(arguments["recipe"].algorithm.inner.num_steps)
        if asked[-1] == 3:
            raise FloatingPointError("test task 1 gives predictions that are not finite.")
        return evaluate_run(folder, **arguments)

    monkeypatch.setattr(runs, "evaluate_run", diverging)
    trained = outcome[0].runs[0].trained
    recipe = trained.recipe
    assert recipe.algorithm.inner.num_steps != 3
    settings = dataclasses.replace(outcome[0].settings, inner_steps=(1, 3))
    found = sinusoid._evaluate(trained, settings, torch.device("cpu"), None)
    assert 3 in asked and 3 not in [point.num_inner_steps for point in found.points]
    assert found.failures == (f"{recipe.name} with 3 inner steps: test task 1 gives predictions that are not finite.",)
    assert f"- Missing: {found.failures[0]}" in summary(SinusoidResult(settings, (found,)))
