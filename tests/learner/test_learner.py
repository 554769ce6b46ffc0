"""The object that users meet: fit, adapt, predict, evaluate, save and load, and what it says to bad input."""

import copy
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import ibaml
from ibaml import MetaLearner, NotFittedError, TaskPosterior, metrics, tree
from ibaml.algorithms import make_algorithm
from ibaml.data import ClassImages, EpisodeSampler, SinusoidTasks
from ibaml.learner.folder import MODEL
from ibaml.likelihoods import Gaussian, Poisson
from ibaml.networks import MLP, Conv4
from ibaml.priors import DiagonalColumnPrior, DiagonalGaussian, DiagonalPrior
from ibaml.solvers.inner import GradientDescent
from ibaml.train import TrainerSettings
from ibaml.train.checkpoint import load_tensors, save_tensors
from ibaml.types import Batch, Episode

SETTINGS = TrainerSettings(num_steps=3, tasks_per_step=2, num_validation_tasks=2, validate_every=2)
ALGORITHMS = {
    name: make_algorithm(name, inner=GradientDescent(num_steps=3, learning_rate=0.1), **settings)
    for name, settings in {
        "maml": {},
        "fomaml": {},
        "imaml": {},
        "abml": {"num_samples": 2, "prior": DiagonalPrior(initial_log_var=(-3.0, -2.0))},
        "vampire": {"num_samples": 2, "prior": DiagonalPrior(initial_log_var=(-3.0, -2.0))},
        "ibaml": {"num_samples": 2, "prior": DiagonalPrior(initial_log_var=(-3.0, -2.0))},
    }.items()
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_tasks(num_ways: int = 3) -> EpisodeSampler:
    data = ClassImages(
        images=torch.randint(0, 256, (30, 1, 2, 2), generator=generator(), dtype=torch.uint8),
        class_start=torch.arange(6) * 6,
        class_names=tuple("abcde"),
    )
    return EpisodeSampler(data, num_ways=num_ways, num_shots=2, num_queries=4)


def episodes(count: int, seed: int = 0) -> list[Episode]:
    drawn = image_tasks().sample(count, generator=generator(seed))
    return [tree.map(lambda leaf, i=index: leaf[i], drawn) for index in range(count)]


def image_network() -> MLP:
    return MLP(3, input_shape=(1, 2, 2), hidden_sizes=(5,), activation="tanh", generator=generator(1))


def own_network() -> nn.Module:
    """A module that is not one of the package's, with a buffer that its outputs depend on."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), Scale(), nn.Tanh(), nn.Linear(5, 3))
    torch.set_rng_state(torch_state)
    return network


class Scale(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value * x


def fitted(name: str = "ibaml", network: nn.Module | None = None, **arguments) -> MetaLearner:
    learner = MetaLearner(network or image_network(), ALGORITHMS[name], **arguments)
    return learner.fit(image_tasks(), settings=SETTINGS)


def regression(name: str = "ibaml", num_outputs: int = 1) -> MetaLearner:
    network = MLP(num_outputs, input_shape=1, hidden_sizes=(5,), activation="tanh", generator=generator(1))
    return MetaLearner(network, ALGORITHMS[name], likelihood="gaussian")


TASK = episodes(1, seed=7)[0]


# The usual way


@pytest.mark.parametrize("name", ALGORITHMS)
def test_fit_adapt_predict_evaluate_save_load(tmp_path, name):
    learner = fitted(name)
    posterior = learner.adapt(*TASK.support)
    assert isinstance(posterior, TaskPosterior)
    assert isinstance(posterior.value, DiagonalGaussian) == (name in ("abml", "vampire", "ibaml"))
    prediction = posterior.predict(TASK.query.x)
    assert prediction.probs.shape == (12, 3)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(12))

    folder = learner.save(str(tmp_path / "new" / "folder"))
    assert folder == tmp_path / "new" / "folder"
    loaded = MetaLearner.load(folder)
    assert loaded.algorithm == learner.algorithm
    again = loaded.adapt(*TASK.support)
    assert again.grad_norm == posterior.grad_norm
    assert torch.equal(again.predict(TASK.query.x).samples(), prediction.samples())
    assert loaded.evaluate(image_tasks(), num_tasks=3) == learner.evaluate(image_tasks(), num_tasks=3)


def test_algorithms_by_name_with_all_their_defaults():
    learner = MetaLearner(image_network())
    assert learner.algorithm == make_algorithm("softmax", prior=DiagonalColumnPrior(tied=False, learn_mean=True))
    exchangeable = MetaLearner(image_network(), classes="per_task")
    assert exchangeable.algorithm == make_algorithm("softmax", prior=DiagonalColumnPrior(tied=True, learn_mean=False))
    assert MetaLearner(likelihood="gaussian").algorithm == make_algorithm("linear_gaussian")
    for likelihood in ("poisson", "negative_binomial", "student_t"):
        assert MetaLearner(likelihood=likelihood).algorithm == make_algorithm("generalized_linear")
    assert MetaLearner(likelihood=Gaussian(heteroscedastic=True)).algorithm.name == "generalized_linear"

    class OfSamples(Poisson):
        """Its predictions take samples of outputs, which a head in closed form has none of."""

        def predict(self, outputs, parameters, *, output_variance=None):
            if output_variance is not None:
                raise ValueError("output_variance: samples are taken.")
            return super().predict(outputs, parameters)

    assert MetaLearner(likelihood=OfSamples()).algorithm.name == "ibaml"
    assert MetaLearner(image_network(), "ibaml").algorithm == ibaml.ibaml()
    assert MetaLearner(image_network(), "maml").algorithm == ibaml.maml()


def test_regression_from_end_to_end(tmp_path):
    tasks = SinusoidTasks(num_shots=4, num_queries=5)
    learner = regression().fit(tasks, tasks, settings=SETTINGS)
    episode = tree.map(lambda leaf: leaf[0], tasks.sample(1, generator=generator()))
    prediction = learner.adapt(*episode.support).predict(episode.query.x)
    assert prediction.mean.shape == prediction.total_uncertainty.shape == (5, 1)
    torch.testing.assert_close(prediction.total_uncertainty, prediction.aleatoric + prediction.epistemic)
    noise = learner.meta_parameters.shared["likelihood.log_noise_variance"].exp()
    noise = learner.calibration_temperature**2 * noise
    torch.testing.assert_close(prediction.aleatoric, noise.expand(5, 1))
    assert bool((prediction.epistemic > 0).all())
    report = learner.evaluate(tasks, num_tasks=4)
    assert report.keys() == {"mse", "nll", "coverage_90", "quantile_calibration_error"}
    learner.save(tmp_path)
    again = MetaLearner.load(tmp_path).adapt(*episode.support).predict(episode.query.x)
    assert torch.equal(again.samples(), prediction.samples())
    assert torch.equal(again.total_uncertainty, prediction.total_uncertainty)


def test_several_outputs(tmp_path):
    x = torch.rand(6, 1, generator=generator())
    batch = Batch(x, torch.cat([x, -x], 1))
    learner = regression(num_outputs=2).fit([Episode(batch, batch)], settings=SETTINGS)
    prediction = learner.adapt(*batch).predict(x)
    assert prediction.mean.shape == prediction.aleatoric.shape == (6, 2)
    assert learner.meta_parameters.shared["likelihood.log_noise_variance"].shape == (2,)


def test_fit_returns_the_learner_and_keeps_its_result(tmp_path):
    learner = MetaLearner(image_network(), ALGORITHMS["maml"])
    assert learner.training_result is None
    assert learner.fit(image_tasks(), image_tasks(), settings=SETTINGS, num_steps=4, run_folder=tmp_path) is learner
    assert learner.training_result.num_steps == 4
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert learner.meta_parameters is learner.training_result.meta


def test_fit_starts_anew_from_the_network(tmp_path):
    learner = MetaLearner(image_network(), ALGORITHMS["maml"])
    first = learner.fit(image_tasks(), settings=SETTINGS).meta_parameters
    second = learner.fit(image_tasks(), settings=SETTINGS).meta_parameters
    assert all(torch.equal(one, two) for one, two in zip(tree.leaves(first), tree.leaves(second), strict=True))


def test_the_seed_of_the_learner_is_that_of_training():
    runs = [
        MetaLearner(image_network(), ALGORITHMS["maml"], seed=seed).fit(image_tasks(), num_steps=1).meta_parameters
        for seed in (0, 0, 5)
    ]
    vectors = [tree.ravel(run)[0] for run in runs]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_fit_shows_progress_when_asked(capsys):
    learner = MetaLearner(image_network(), ALGORITHMS["maml"])
    learner.fit(image_tasks(), image_tasks(), settings=SETTINGS)
    assert capsys.readouterr() == ("", "")
    learner.fit(image_tasks(), image_tasks(), settings=SETTINGS, progress=True)
    assert "step 2: validation accuracy" in capsys.readouterr().err


def test_fit_with_a_time_limit():
    learner = MetaLearner(image_network(), ALGORITHMS["maml"])
    learner.fit(image_tasks(), num_steps=1000, max_minutes=1e-9)
    assert learner.training_result.stop_reason == "time limit" and learner.training_result.num_steps == 1
    with pytest.raises(ValueError, match="max_minutes must be positive"):
        learner.fit(image_tasks(), max_minutes=0)


# Sequences of episodes


def test_sequences_of_episodes():
    train, test = episodes(6), episodes(4, seed=1)
    learner = MetaLearner(image_network(), ALGORITHMS["ibaml"]).fit(train, tuple(test), settings=SETTINGS)
    result = learner.evaluate_in_full(test)
    # Each once and in order, however many are asked for.
    assert torch.equal(result.targets, torch.stack([task.query.y for task in test]))
    assert learner.evaluate(test, num_tasks=2) == dict(result.report)
    assert result.report["accuracy"].num_tasks == 4


def test_episodes_of_unequal_sizes():
    def cut(task: Episode, size: int) -> Episode:
        return Episode(Batch(task.support.x[:size], task.support.y[:size]), task.query)

    tasks = [cut(task, size) for task, size in zip(episodes(3), (3, 4, 6), strict=True)]
    learner = MetaLearner(image_network(), ALGORITHMS["ibaml"])
    one_at_a_time = TrainerSettings(num_steps=2, tasks_per_step=1, num_validation_tasks=2, validate_every=1)
    learner.fit(tasks, tasks, settings=one_at_a_time)
    result = learner.evaluate_in_full(tasks)
    assert result.log_probs.shape == (3, 12, 3)
    for task, log_probs in zip(tasks, result.log_probs, strict=True):
        assert torch.isfinite(log_probs).all() and log_probs.shape[0] == len(task.query.y)


def test_evaluation_scores_predictions_of_adapted_weights():
    learner = fitted("maml")
    result = learner.evaluate_in_full([TASK])
    prediction = learner.adapt(*TASK.support).predict(TASK.query.x)
    torch.testing.assert_close(result.log_probs[0].exp().float(), prediction.probs, rtol=1e-5, atol=1e-6)
    expected = metrics.accuracy(prediction.probs.double().unsqueeze(0), TASK.query.y.unsqueeze(0))
    torch.testing.assert_close(result.per_task["accuracy"], expected)


# Uncertainty


def test_uncertainty_of_a_bayesian_learner():
    prediction = fitted("ibaml").adapt(*TASK.support).predict(TASK.query.x)
    samples = prediction.samples().double()
    mean = samples.mean(0)
    total = -(mean * mean.log()).sum(-1)
    aleatoric = -(samples * samples.log()).sum(-1).mean(0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(prediction.total_uncertainty.double(), total, **tolerance)
    torch.testing.assert_close(prediction.aleatoric.double(), aleatoric, **tolerance)
    torch.testing.assert_close(prediction.epistemic.double(), total - aleatoric, **tolerance)
    assert samples.shape[0] == 10 and bool((prediction.epistemic > 1e-5).all())


@pytest.mark.parametrize("name", ["maml", "fomaml", "imaml"])
def test_weights_algorithms_have_no_epistemic_uncertainty(name):
    prediction = fitted(name).adapt(*TASK.support).predict(TASK.query.x)
    assert prediction.samples().shape[0] == 1
    assert bool((prediction.epistemic == 0).all())
    torch.testing.assert_close(prediction.total_uncertainty, prediction.aleatoric)


def test_epistemic_uncertainty_grows_with_the_variance_of_the_prior():
    values = []
    for low in (-12.0, -2.0):
        algorithm = make_algorithm(
            "ibaml", inner=GradientDescent(num_steps=1), prior=DiagonalPrior(initial_log_var=(low, low))
        )
        learner = MetaLearner(image_network(), algorithm).fit(image_tasks(), num_steps=1)
        values.append(learner.adapt(*TASK.support).predict(TASK.query.x).epistemic.mean())
    assert values[1] > 100 * values[0]


def test_seeds_of_adaptation_and_prediction():
    learner = fitted("ibaml")
    posterior = learner.adapt(*TASK.support)
    again = learner.adapt(*TASK.support, seed=0)
    other = learner.adapt(*TASK.support, seed=1)
    assert torch.equal(tree.ravel(posterior.value)[0], tree.ravel(again.value)[0])
    assert not torch.equal(tree.ravel(posterior.value)[0], tree.ravel(other.value)[0])
    first, same, different = (posterior.predict(TASK.query.x, seed=seed).probs for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, different)


def test_grad_norm_is_that_of_the_inner_problem():
    algorithm = make_algorithm("imaml", inner=GradientDescent(num_steps=800, learning_rate=0.3), proximal_strength=0.5)
    few = fitted("imaml").adapt(*TASK.support).grad_norm
    assert fitted("imaml").adapting_with(algorithm).adapt(*TASK.support).grad_norm < 1e-4 < few


# Which parameters are adapted


def test_adapt_and_freeze_patterns(tmp_path):
    network = own_network()
    before = copy.deepcopy(network.state_dict())
    learner = fitted("ibaml", network, adapt="4.*", freeze=["1.bias"])
    posterior = learner.adapt(*TASK.support)
    assert posterior.value.mean.keys() == {"4.weight", "4.bias"}
    assert learner.meta_parameters.shared.keys() == {"1.weight"}
    assert not torch.equal(learner.meta_parameters.shared["1.weight"], before["1.weight"])
    assert torch.equal(learner.model.frozen["1.bias"], before["1.bias"])
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), "the module itself is never changed"


@pytest.mark.parametrize(("argument", "pattern"), [("adapt", "hed.*"), ("freeze", "fetures.*")])
def test_patterns_that_match_nothing(argument, pattern):
    with pytest.raises(ValueError, match=rf"{argument} pattern '{re.escape(pattern)}' matches none of the parameters"):
        MetaLearner(image_network(), **{argument: pattern})


# Saving and loading


def test_modules_of_ones_own_are_loaded_into_a_module(tmp_path):
    learner = fitted("ibaml", own_network(), adapt="4.*", freeze="1.*")
    prediction = learner.adapt(*TASK.support).predict(TASK.query.x).probs
    learner.save(tmp_path)
    with pytest.raises(
        ValueError, match="holds a network that is not one of ibaml.networks: pass a module of the same"
    ):
        MetaLearner.load(tmp_path)
    # Of other weights, frozen ones among them, and another buffer.
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), Scale(9.0), nn.Tanh(), nn.Linear(5, 3))
    loaded = MetaLearner.load(tmp_path, network=other)
    assert torch.equal(loaded.adapt(*TASK.support).predict(TASK.query.x).probs, prediction)


def test_frozen_parameters_of_the_packages_networks(tmp_path):
    network = image_network()
    network.features.requires_grad_(False)
    learner = fitted("ibaml", network)
    assert learner.model.frozen.keys() == {"features.0.weight", "features.0.bias"}
    prediction = learner.adapt(*TASK.support).predict(TASK.query.x).probs
    learner.save(tmp_path)
    loaded = MetaLearner.load(tmp_path)
    assert torch.equal(loaded.adapt(*TASK.support).predict(TASK.query.x).probs, prediction)


def test_double_precision_is_kept(tmp_path):
    tasks = [tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, task) for task in episodes(3)]
    learner = MetaLearner(image_network().double(), ALGORITHMS["maml"]).fit(tasks, settings=SETTINGS)
    prediction = learner.adapt(*tasks[0].support).predict(tasks[0].query.x).probs
    assert prediction.dtype == torch.float64
    learner.save(tmp_path)
    again = MetaLearner.load(tmp_path).adapt(*tasks[0].support).predict(tasks[0].query.x).probs
    assert torch.equal(again, prediction)


def test_images_through_a_convolutional_network(tmp_path):
    images = torch.randint(0, 256, (12, 1, 16, 16), generator=generator(), dtype=torch.uint8)
    data = ClassImages(images=images, class_start=torch.arange(4) * 4, class_names=("a", "b", "c"))
    tasks = EpisodeSampler(data, num_ways=2, num_shots=2, num_queries=2)
    network = Conv4(2, channels=2, image_size=16, generator=generator())
    learner = MetaLearner(network, ALGORITHMS["maml"]).fit(tasks, num_steps=1)
    episode = tree.map(lambda leaf: leaf[0], tasks.sample(1, generator=generator()))
    prediction = learner.adapt(*episode.support).predict(episode.query.x).probs
    learner.save(tmp_path)
    assert torch.equal(MetaLearner.load(tmp_path).adapt(*episode.support).predict(episode.query.x).probs, prediction)


def test_the_file_is_plain(tmp_path):
    file = fitted("ibaml").save(tmp_path) / MODEL
    with safe_open(file, framework="pt") as content:
        assert {name.rsplit("/", 1)[0] for name in content.keys()} == {"prior/mean", "prior/log_var"}  # noqa: SIM118
    _, metadata = load_tensors(file)
    assert metadata["versions"]["ibaml"] == ibaml.__version__
    learner = metadata["learner"]
    assert learner["network"]["name"] == "MLP" and learner["algorithm"]["type"] == "IBAML"


def test_saving_again_replaces(tmp_path):
    learner = fitted("maml")
    learner.save(tmp_path)
    learner.fit(image_tasks(), settings=SETTINGS, num_steps=5).save(tmp_path)
    loaded = MetaLearner.load(tmp_path).meta_parameters
    assert torch.equal(tree.ravel(loaded)[0], tree.ravel(learner.meta_parameters)[0])


def test_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent has no model.safetensors: it holds no trained model"):
        MetaLearner.load(tmp_path / "absent")
    file = fitted("maml").save(tmp_path) / MODEL
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    with pytest.raises(ValueError, match="is damaged: its checksum does not match"):
        MetaLearner.load(tmp_path)
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        MetaLearner.load(tmp_path)
    save_tensors(file, {"x": torch.ones(1)}, {"step": 3})
    with pytest.raises(ValueError, match="is no trained model: it was not written by MetaLearner.save"):
        MetaLearner.load(tmp_path)


def test_networks_of_other_settings_are_refused_and_modules_that_look_otherwise_are_told(tmp_path):
    """Weights of the same names and shapes fit into both."""

    def mlp(activation: str) -> MLP:
        return MLP(3, input_shape=(1, 2, 2), hidden_sizes=(4,), activation=activation)

    fitted("maml", mlp("relu")).save(tmp_path / "own")
    message = "belongs to another network: network.arguments.activation was 'relu' and is now 'tanh'. Leave network out"
    with pytest.raises(ValueError, match=message):
        MetaLearner.load(tmp_path / "own", network=mlp("tanh"))
    MetaLearner.load(tmp_path / "own", network=mlp("relu"))
    fitted("maml", own_network(), adapt="4.*", freeze="1.*").save(tmp_path / "module")
    message = r"another: '\(3\): ReLU\(\)' in place of '\(3\): Tanh\(\)'. Predictions are right only if both compute"
    with pytest.warns(RuntimeWarning, match=message):
        MetaLearner.load(
            tmp_path / "module",
            network=nn.Sequential(nn.Flatten(), nn.Linear(4, 5), Scale(), nn.ReLU(), nn.Linear(5, 3)),
        )


def test_modules_of_another_architecture_are_refused(tmp_path):
    fitted("maml", own_network(), adapt="4.*", freeze="1.*").save(tmp_path)

    def load(*layers: nn.Module) -> None:
        MetaLearner.load(tmp_path, network=nn.Sequential(nn.Flatten(), *layers))

    message = r"belongs to another network or algorithm: .*4\.weight has shape \(3, 5\), the model \(3, 6\)"
    with pytest.raises(ValueError, match=message):
        load(nn.Linear(4, 6), Scale(), nn.Tanh(), nn.Linear(6, 3))
    message = r"belongs to another network: frozen/1\.weight has shape \(5, 4\), the model's has shape \(5, 2\)"
    with pytest.raises(ValueError, match=message):
        load(nn.Linear(2, 5), Scale(), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"frozen/1\.extra is missing, the model's has shape \(1,\)"):
        extended = nn.Linear(4, 5)
        extended.extra = nn.Parameter(torch.ones(1))
        extended.extra.requires_grad_(False)
        load(extended, Scale(), nn.Tanh(), nn.Linear(5, 3))


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        fitted("maml").save(tmp_path / "file" / "folder")


# What it says to bad input


def test_not_fitted(tmp_path):
    learner = MetaLearner(image_network())
    attempts = (
        lambda: learner.adapt(*TASK.support),
        lambda: learner.evaluate(image_tasks()),
        lambda: learner.save(tmp_path / "folder"),
        lambda: learner.meta_parameters,
    )
    for attempt in attempts:
        with pytest.raises(NotFittedError, match=r"has not been fitted: call fit\(train_tasks\) or MetaLearner\.load"):
            attempt()
    assert not (tmp_path / "folder").exists()


def test_unknown_names():
    with pytest.raises(ValueError, match="algorithm must be one of maml, .*, ibaml, .* but is 'mamel'"):
        MetaLearner(image_network(), "mamel")
    with pytest.raises(ValueError, match="likelihood must be one of categorical, .* but is 'poison'"):
        MetaLearner(image_network(), likelihood="poison")


def test_fit_refuses_tasks_that_do_not_fit():
    learner = MetaLearner(image_network(), ALGORITHMS["maml"])
    with pytest.raises(ValueError, match="episodes is empty"):
        learner.fit([])
    with pytest.raises(ValueError, match="training task support.y has labels from 0 to 4, but the network has 3"):
        learner.fit(image_tasks(num_ways=5))
    wide = Batch(torch.rand(3, 7), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"cannot process validation task support\.x of shape \(3, 7\)"):
        learner.fit(image_tasks(), [Episode(wide, wide)])


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            [[1.0]],
            TASK.support.y,
            TypeError,
            "x_support must be a torch.Tensor or numeric numpy array, got list; convert it with",
        ),
        (TASK.support.x, [0, 1], TypeError, "y_support must be a torch.Tensor or numeric numpy array, got list"),
        (
            TASK.support.x[:, 0, 0],
            TASK.support.y,
            ValueError,
            r"x_support has dtype float32 and shape \[6, 2\], but .* of shape \[num_examples, 1, 2, 2\]: reshape",
        ),
        (TASK.support.x[:0], TASK.support.y[:0], ValueError, "the support is empty, and algorithm 'maml' has no prior"),
        (TASK.support.x, TASK.support.y[:2], ValueError, "the task's support has 6 inputs and 2 targets"),
        (TASK.support.x, TASK.support.y + 1, ValueError, r"the task's support\.y has labels from 1 to 3"),
        (TASK.support.x, TASK.support.y.float(), ValueError, r"the task's support\.y has dtype torch\.float32"),
        (TASK.support.x / 0, TASK.support.y, ValueError, r"the task's support\.x has \d+ NaN or infinite values"),
    ],
)
def test_adapt_refuses(x, y, error, message):
    with pytest.raises(error, match=message):
        fitted("maml").adapt(x, y)


def test_adapt_refuses_in_regression():
    tasks = SinusoidTasks(num_shots=4, num_queries=5)
    learner = regression("maml").fit(tasks, settings=SETTINGS)
    x = torch.rand(3, 1, generator=generator())
    for y, message in (
        (torch.zeros(3, dtype=torch.int64), "expected real targets; convert them with .float()"),
        (torch.zeros(3), r"has shape \(3,\), but expected \[..., num_examples, 1\]"),
        (torch.full((3, 1), torch.inf), "has NaN or infinite values: drop or impute"),
    ):
        with pytest.raises(ValueError, match=r"the task's support\.y .*" + message):
            learner.adapt(x, y)


@pytest.mark.parametrize("network", [image_network, own_network])
def test_predict_refuses(network):
    posterior = fitted("ibaml", network()).adapt(*TASK.support)
    with pytest.raises(ValueError, match=r"x_query has 12 NaN or infinite values, the first at index \(0, 0, 0, 0\)"):
        posterior.predict(torch.full((3, 1, 2, 2), torch.nan))
    with pytest.raises(TypeError, match="x_query must be a torch.Tensor or numeric numpy array, got list"):
        posterior.predict(TASK.query.x.tolist())
    with pytest.raises(
        ValueError, match=r"the network \(.*\) cannot process x_query of shape \(3, 1, 3, 3\) and dtype"
    ):
        posterior.predict(torch.zeros(3, 1, 3, 3))


def test_inputs_of_another_float_type_are_converted():
    learner = fitted("maml")
    single = learner.adapt(*TASK.support).predict(TASK.query.x).probs
    double = learner.adapt(TASK.support.x.double(), TASK.support.y).predict(TASK.query.x.double()).probs
    torch.testing.assert_close(single, double)
    small = learner.adapt(TASK.support.x, TASK.support.y.to(torch.int32)).predict(TASK.query.x).probs
    assert torch.equal(small, single)
