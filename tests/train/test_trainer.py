"""The loop: what a step does, what it leaves in its folder, which state it chooses, what it learns."""

import dataclasses
import math
import signal

import pytest
import torch
from tests.train.trainings import (
    ALGORITHMS,
    SMALL,
    Interrupted,
    assert_same_meta,
    fit,
    generator,
    image_model,
    image_tasks,
    make,
    rows_of,
    sinusoid_model,
    state_of,
)

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.data import FixedEpisodes, SinusoidTasks
from ibaml.likelihoods import Categorical
from ibaml.networks import MLP
from ibaml.posterior import FittedModel
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.solvers.inner import GradientDescent
from ibaml.train import evaluate as evaluation
from ibaml.train import trainer
from ibaml.train.result import Chosen
from ibaml.train.trainer import (
    Trainer,
    TrainerSettings,
    TrainingResult,
)
from ibaml.types import Batch, Episode

# Run folders


def test_unwritable_run_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    unwritable = make(tmp_path / "file" / "run")
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"run_folder .*file/run cannot be written \(.*\): choose another with"):
        unwritable.fit(image_tasks())


def test_nothing_is_written_without_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(None, "ibaml")
    assert result.num_steps == 6
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_changes_nothing(tmp_path):
    assert_same_meta(fit(None, "ibaml").last_meta, fit(tmp_path, "ibaml").last_meta)


def test_log_rows_are_averages_over_log_every_steps(tmp_path):
    fit(tmp_path / "single")
    fit(tmp_path / "triple", settings=dataclasses.replace(SMALL, log_every=3))
    single = [row for row in rows_of(tmp_path / "single") if "loss" in row]
    triple = [row for row in rows_of(tmp_path / "triple") if "loss" in row]
    assert [row["step"] for row in single] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in triple] == [3, 6]
    for row, part in zip(triple, (single[:3], single[3:]), strict=True):
        for name in ("loss", "accuracy", "inner_grad_norm", "linear_residual", "linear_converged", "gradient_norm"):
            assert row[name] == pytest.approx(sum(step[name] for step in part) / 3, rel=1e-12)
    validated = [row for row in rows_of(tmp_path / "single") if "validation_nll" in row]
    assert [row["step"] for row in validated] == [2, 4, 6]
    assert {"validation_accuracy", "validation_ece", "validation_brier"} <= validated[0].keys()


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_new_choice_is_handed_on_once(tmp_path, stop):
    """After each checkpoint that holds a new chosen state, and first of all after a resumption."""
    chosen = []

    def run(max_minutes: float | None = None) -> TrainingResult:
        def keep(new: Chosen) -> None:
            assert state_of(tmp_path)[1]["best_step"] == new.step
            chosen.append((new.step, tree.map(torch.clone, new.meta)))

        return Trainer(image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, on_chosen=keep).fit(
            image_tasks(0), image_tasks(1), max_minutes=max_minutes
        )

    for _ in range(stop or 0):
        run(max_minutes=1e-9)
    first_of_last_run = len(chosen)
    result = run()
    steps = [step for step, _ in chosen[first_of_last_run:]]
    assert steps == sorted(set(steps)) and steps[-1] == result.best_step
    assert_same_meta(chosen[-1][1], result.meta)


def test_no_choice_is_handed_on_before_there_is_one(tmp_path):
    class Early(Interrupted):
        signals = {1: [signal.SIGINT]}

    Early(
        image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, on_chosen=lambda *_: pytest.fail("chosen")
    ).fit(image_tasks(0), image_tasks(1))


# What a step does


def float64_tasks() -> FixedEpisodes:
    source = generator(5)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=source, dtype=torch.float64)
        return Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    return FixedEpisodes([Episode(batch(5), batch(4)) for _ in range(7)])


def float64_model() -> Model:
    network = MLP(3, input_shape=3, hidden_sizes=(4,), activation="tanh", generator=generator()).double()
    return build_model(network, Categorical(), adapt="head.*")


class Recorded(Trainer):
    """Keeps the gradients that it applies."""

    applied: list[MetaParameters]

    def _apply(self, gradient: MetaParameters) -> None:
        self.applied = [*getattr(self, "applied", []), gradient]
        super()._apply(gradient)


@pytest.mark.parametrize("name", ["maml", "fomaml", "imaml", "abml", "vampire", "ibaml"])
def test_chunks_give_the_same_gradients(name):
    algorithm = make_algorithm(name, inner=GradientDescent(num_steps=2, learning_rate=0.1))
    gradients = []
    for chunk in (None, 1, 2, 8):
        settings = dataclasses.replace(SMALL, num_steps=1, tasks_per_step=5, tasks_per_chunk=chunk, gradient_clip=None)
        run = Recorded(float64_model(), algorithm, settings)
        run.fit(float64_tasks())
        gradients.append(run.applied)
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            for one, two in zip(tree.leaves(gradient), tree.leaves(other), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_a_step_applies_the_mean_hypergradient_of_its_tasks():
    """Against the algorithm called task by task, and Adam's first step, which is the learning rate in the sign."""
    algorithm, settings = ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=1, gradient_clip=None)
    run = Recorded(image_model(), algorithm, settings)
    result = run.fit(image_tasks())

    model, source = image_model(), generator(settings.seed)
    meta = algorithm.init(model.adapted, model.shared, generator=source)
    episodes = image_tasks().sample(3, generator=source)
    noises = [algorithm.draw_noise(meta, generator=source) for _ in range(3)]
    tasks = [tree.map(lambda leaf, i=index: leaf[i], episodes) for index in range(3)]
    single = [algorithm.hypergradient(model, meta, task, noise)[0] for task, noise in zip(tasks, noises, strict=True)]
    for name, before in model.adapted.items():
        mean = torch.stack([gradient.prior[name] for gradient in single]).mean(0)
        torch.testing.assert_close(run.applied[0].prior[name], mean, rtol=1e-5, atol=1e-7)
        step = settings.learning_rate * mean / (mean.abs() + 1e-8)
        torch.testing.assert_close(result.last_meta.prior[name], before - step, rtol=1e-4, atol=1e-5)


def test_log_variances_have_a_learning_rate_of_their_own():
    settings = dataclasses.replace(SMALL, num_steps=1, learning_rate=1e-2, log_var_learning_rate=0.5)
    run = make(None, "ibaml", settings)
    before = run._snapshot()
    after = run.fit(image_tasks()).last_meta
    assert isinstance(before.prior, DiagonalGaussian) and isinstance(after.prior, DiagonalGaussian)
    moved = [
        torch.cat([(after_group[name] - value).abs().flatten() for name, value in before_group.items()]).max()
        for before_group, after_group in (
            (before.prior.mean, after.prior.mean),
            (before.prior.log_var, after.prior.log_var),
        )
    ]
    assert float(moved[0]) == pytest.approx(1e-2, rel=1e-2)
    assert float(moved[1]) == pytest.approx(0.5, rel=1e-2)


def test_gradient_clipping_shortens_and_never_lengthens():
    free, clipped, loose = (
        Recorded(image_model(), ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=1, gradient_clip=clip))
        for clip in (None, 1e-3, 1e3)
    )
    for run in (free, clipped, loose):
        run.fit(image_tasks())
    norm = float(tree.norm(free.applied[0]))
    assert norm > 1e-2
    assert float(tree.norm(clipped.applied[0])) == pytest.approx(1e-3, rel=1e-5)
    for one, other in zip(tree.leaves(clipped.applied[0]), tree.leaves(free.applied[0]), strict=True):
        torch.testing.assert_close(one, other * (1e-3 / norm), rtol=1e-4, atol=1e-9)
    assert_same_meta(loose.applied[0], free.applied[0])


def test_a_zero_gradient_survives_clipping():
    constant = Batch(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    # One class and one output: the nll is zero whatever the weights.
    network = MLP(1, input_shape=3, hidden_sizes=()).double()
    model = build_model(network, Categorical())
    result = Trainer(model, ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=2)).fit(
        FixedEpisodes([Episode(constant, constant)])
    )
    assert bool(tree.all_finite(result.last_meta))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedule(schedule):
    rates = []

    class Watched(Trainer):
        def _apply(self, gradient):
            super()._apply(gradient)
            rates.append([group["lr"] for group in self._optimizer.param_groups])

    settings = dataclasses.replace(SMALL, num_steps=4, schedule=schedule, log_var_learning_rate=0.1)
    Watched(image_model(), ALGORITHMS["ibaml"], settings).fit(image_tasks())
    half = math.sqrt(0.5) / 2
    factors = [1, 1, 1, 1] if schedule == "constant" else [1, 0.5 + half, 0.5, 0.5 - half]
    for factor, (mean_rate, log_var_rate) in zip(factors, rates, strict=True):
        assert mean_rate == pytest.approx(1e-2 * factor, rel=1e-12)
        assert log_var_rate == pytest.approx(0.1 * factor, rel=1e-12)


def test_the_model_of_the_user_is_not_changed():
    model = image_model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    Trainer(model, ALGORITHMS["ibaml"], SMALL).fit(image_tasks())
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(model.adapted[name], before[name])


def test_the_seed_decides():
    runs = [fit(None, "ibaml", dataclasses.replace(SMALL, seed=seed)).last_meta for seed in (0, 0, 1)]
    assert_same_meta(runs[0], runs[1])
    assert not torch.equal(tree.ravel(runs[0])[0], tree.ravel(runs[2])[0])


def test_the_global_seed_does_not():
    # Building a module draws from it before the module's own initialisation does.
    runs = [make(None, "ibaml"), make(None, "ibaml")]
    state = torch.get_rng_state()
    results = []
    for run in runs:
        results.append(run.fit(image_tasks(0), image_tasks(1)).last_meta)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        state = torch.get_rng_state()
    assert_same_meta(*results)


# Choosing the best


def fitted_model(model, algorithm, meta):
    return FittedModel(model=model, algorithm=algorithm, meta=meta, preprocessing=None, device=torch.device("cpu"))


def test_the_logged_loss_is_that_of_a_task_however_many_there_are(tmp_path):
    class Same(SinusoidTasks):
        """Tasks that are all the first one."""

        def sample(self, num_tasks, *, generator):
            one = super().sample(1, generator=generator)
            return tree.map(lambda leaf: leaf.expand(num_tasks, *leaf.shape[1:]), one)

    losses = []
    for count in (1, 3):
        settings = dataclasses.replace(SMALL, num_steps=1, tasks_per_step=count)
        folder = tmp_path / str(count)
        Trainer(sinusoid_model(), ALGORITHMS["maml"], settings, run_folder=folder).fit(Same(num_shots=3, num_queries=3))
        losses.append(rows_of(folder)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_validation_chooses_the_best_state(tmp_path, monkeypatch):
    # Of equal states the earlier one.
    nlls = iter([3.0, 1.0, 1.0])
    seen = []
    real = trainer.evaluate

    def scripted(fitted, tasks, **arguments):
        result = real(fitted, tasks, **arguments)
        seen.append((tree.map(torch.clone, fitted.meta), arguments["seed"], arguments["num_tasks"]))
        nll = result.report["nll"]._replace(mean=next(nlls))
        return dataclasses.replace(result, report={**result.report, "nll": nll})

    monkeypatch.setattr(trainer, "evaluate", scripted)
    monkeypatch.setattr(trainer, "tempered", lambda likelihood, result, temperature: result)
    result = fit(tmp_path)
    assert result.best_step == 4
    assert_same_meta(result.meta, seen[1][0])
    assert_same_meta(result.last_meta, seen[2][0])
    assert not torch.equal(tree.ravel(result.meta)[0], tree.ravel(result.last_meta)[0])
    assert {seed for _, seed, _ in seen} == {10**6} and {count for *_, count in seen} == {3}


def test_validations_are_where_they_are_due_and_at_the_end(tmp_path):
    fit(tmp_path, settings=dataclasses.replace(SMALL, num_steps=5))
    assert [row["step"] for row in rows_of(tmp_path) if "validation_nll" in row] == [2, 4, 5]


def test_logged_validation_equals_an_evaluation_of_that_state(tmp_path):
    result = fit(tmp_path, "ibaml", settings=dataclasses.replace(SMALL, num_validation_tasks=12))
    logged = {row["step"]: row for row in rows_of(tmp_path) if "validation_nll" in row}
    fitted = fitted_model(image_model(), ALGORITHMS["ibaml"], result.meta)
    fitted = dataclasses.replace(fitted, temperature=result.chosen.temperature)
    assert logged[result.best_step]["validation_temperature"] == fitted.temperature != 1
    again = evaluation.evaluate(fitted, image_tasks(1), num_tasks=12, seed=SMALL.seed + 10**6)
    assert logged[result.best_step]["validation_nll"] == pytest.approx(again.report["nll"].mean, abs=1e-6)
    assert min(row["validation_nll"] for row in logged.values()) == logged[result.best_step]["validation_nll"]


# Learning


@pytest.mark.parametrize("name", ["maml", "imaml", "abml", "ibaml"])
def test_training_lowers_the_loss_after_adaptation(name):
    """Blobs in the plane whose classes sit at the same places in every task, under shuffled labels."""
    source = generator(3)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])

    def task() -> Episode:
        order = torch.randperm(3, generator=source)

        def batch(per_class: int) -> Batch:
            y = torch.arange(3).repeat_interleave(per_class)
            return Batch(centres[order][y] + 0.3 * torch.randn(len(y), 2, generator=source), y)

        return Episode(batch(4), batch(4))

    settings: dict = {"inner": GradientDescent(num_steps=2, learning_rate=0.2)}
    if name in ("abml", "vampire", "ibaml"):
        settings |= {"num_samples": 2, "temperature": 0.01, "prior": DiagonalPrior(initial_log_var=(-7.0, -7.0))}
    if name == "imaml":
        settings |= {"proximal_strength": 0.1}
    algorithm = make_algorithm(name, **settings)
    network = MLP(3, input_shape=2, hidden_sizes=(16,), activation="tanh", generator=generator())
    model = build_model(network, Categorical())
    train_tasks, test_tasks = FixedEpisodes([task() for _ in range(40)]), FixedEpisodes([task() for _ in range(20)])
    run = Trainer(model, algorithm, TrainerSettings(num_steps=30, learning_rate=0.1, tasks_per_step=4))
    before = run._snapshot()
    after = run.fit(train_tasks).meta
    nll = [
        evaluation.evaluate(fitted_model(model, algorithm, meta), test_tasks, num_tasks=20, seed=1).report["nll"].mean
        for meta in (before, after)
    ]
    assert nll[1] < 0.7 * nll[0]
