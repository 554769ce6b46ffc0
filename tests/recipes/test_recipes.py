"""Every recipe is whole, survives JSON, and can be changed by name; a misspelt name says the nearest one."""

import dataclasses
import functools
import json
import re

import pytest
import torch
from PIL import Image

from ibaml import tree
from ibaml.algorithms import ALGORITHMS
from ibaml.data import ClassImages
from ibaml.data.sources import ImageFolder, ImageSource
from ibaml.priors import DiagonalPrior
from ibaml.recipes import RECIPES, Recipe, get_recipe
from ibaml.recipes.flags import parse_flags
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG

# FS-Mol has support sizes rather than shots; tests/experiments/test_fsmol.py trains on its layout.
OF_SHOTS = [name for name in RECIPES if not name.startswith("fsmol")]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def fake_images(image_size: int, channels: int = 1) -> ClassImages:
    """Twenty classes of twenty random images, what every image source has at least; sixty of drawn ones."""
    num_classes = 60 if channels == 1 else 20
    size = (20 * num_classes, channels, image_size, image_size)
    return ClassImages(
        images=torch.randint(0, 256, size, generator=generator(), dtype=torch.uint8),
        class_start=torch.arange(num_classes + 1) * 20,
        class_names=tuple(f"class {index}" for index in range(num_classes)),
    )


@pytest.fixture
def fake_sources(monkeypatch):
    """Stands in for the image files and keeps what was asked for."""
    asked = []

    def load(source):
        def call(split, **arguments):
            asked.append((source, split, arguments))
            return fake_images(arguments["image_size"], 3 if "imagenet" in source else 1)

        return call

    for source in ("glyphs", "omniglot", "mini_imagenet", "tiny_imagenet"):
        monkeypatch.setattr(f"ibaml.data.sources.{source}.load_{source}", load(source))
    return asked


# The list


def test_the_list():
    omniglot = {
        f"omniglot_{task}_{algorithm}"
        for task in ("5way_1shot", "5way_5shot", "20way_1shot")
        for algorithm in ("maml", "imaml", "abml", "ibaml")
    }
    glyphs = {f"glyphs_5way_5shot_{algorithm}" for algorithm in ("maml", "imaml", "abml", "ibaml")}
    sinusoid = {f"sinusoid_{shots}shot_{algorithm}" for shots in (5, 10) for algorithm in ("maml", "abml", "ibaml")}
    few_shot = {
        f"{source}_5way_{shots}shot_{method}{suffix}"
        for source in ("mini_imagenet", "tiny_imagenet")
        for shots in (1, 5)
        for method in ("maml_k5", "abml_k5", "ibaml_k5", "ibaml_k10", "ibaml_k15")
        for suffix in ("", "_laptop")
    }
    assert omniglot | glyphs | sinusoid | few_shot <= RECIPES.keys()


@pytest.mark.parametrize("name", OF_SHOTS)
def test_a_recipe_is_what_its_name_says(name):
    recipe = get_recipe(name)
    assert recipe.name == name and recipe == get_recipe(name)
    source, _, algorithm, inner_steps = re.fullmatch(
        r"([a-z_]+?)_(\d+way_)?\d+shot(?:_(?:conv4|resnet12)_gpu)?(?:_([a-z]+))?(?:_k(\d+))?(?:_laptop)?", name
    ).groups()
    assert recipe.data.name == source
    if inner_steps is not None:
        assert recipe.algorithm.inner.num_steps == int(inner_steps)
        assert f"K={inner_steps}," in recipe.description
    assert ("LAPTOP SCALE, not the paper's" in recipe.description) == name.endswith("_laptop")
    if algorithm is None:
        assert recipe.algorithm.uses_features and "a head solved exactly" in recipe.description
    else:
        assert recipe.algorithm.name == algorithm and algorithm in ALGORITHMS
        assert algorithm in recipe.description
    shots = int(re.search(r"(\d+)shot", name).group(1))
    assert recipe.data.num_shots == shots
    if ways := re.search(r"(\d+)way", name):
        assert recipe.data.num_ways == recipe.network.arguments["num_outputs"] == int(ways.group(1))
        assert recipe.likelihood == "categorical"
    else:
        assert recipe.likelihood == ("unit_gaussian" if algorithm == "maml" else "gaussian")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = get_recipe(name)
    text = recipe.to_json()
    again = Recipe.from_json(text)
    assert again == recipe
    assert again.to_json() == text and json.loads(text)["name"] == name


# Of Table 1 and Fig. 3 one method: the others have the same tasks and network. Those for a GPU are tried in small.
@pytest.mark.parametrize("name", [name for name in OF_SHOTS if not re.search(r"imagenet.*_(abml|ibaml|gpu)", name)])
def test_a_recipe_builds(name, fake_sources):
    """Network, tasks of all splits and algorithm fit together: one task goes through."""
    recipe = get_recipe(name)
    model = recipe.learner().model
    for split in ("train", "validation", "test"):
        tasks = recipe.data.sampler(split)
        episode = tree.map(lambda leaf: leaf[0], tasks.sample(1, generator=generator()))
        assert model.check_task(episode, algorithm=recipe.algorithm) == tasks.num_outputs
        num_classes = tasks.num_outputs if recipe.likelihood == "categorical" else 1
        shots = recipe.data.num_shots
        if split == "train" and isinstance(recipe.data, ImageSource):
            shots = recipe.data.num_train_shots or shots
        assert len(episode.support.y) == shots * num_classes
        queries = recipe.data.num_queries if split == "train" else recipe.data.num_test_queries
        assert len(episode.query.y) == queries * num_classes
    again = recipe.learner().model
    for group in ("adapted", "shared"):
        for key, value in getattr(model, group).items():
            assert torch.equal(value, getattr(again, group)[key]), "initial weights are those of the seed"
    other = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, seed=1)).learner().model
    assert not torch.equal(tree.ravel(other.adapted | other.shared)[0], tree.ravel(model.adapted | model.shared)[0])


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_gpu")])
def test_recipes_for_a_gpu_train_in_small(name, fake_sources):
    recipe = get_recipe(name)
    network = recipe.learner().model.network
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert weights == (118_213 if "conv4" in name else 12_427_525) and network.norm == "running"
    assert recipe.data.augmentation.flip and recipe.trainer.weight_decay and recipe.trainer.precision == "bfloat16"
    assert recipe.trainer.schedule == "cosine" and "for a GPU and not measured" in recipe.description
    width = "channels" if "conv4" in name else "widths"
    small = recipe.replace(
        {
            "data.image_size": 16,
            "data.num_queries": 2,
            "data.num_test_queries": 2,
            "network.arguments.image_size": 16,
            f"network.arguments.{width}": 4 if "conv4" in name else (4, 4, 8, 8),
            "trainer.num_steps": 2,
            "trainer.num_validation_tasks": 3,
        }
    )
    tasks = {split: small.data.sampler(split) for split in ("train", "validation")}
    learner = small.learner()
    before = {key: value.clone() for key, value in learner.model.shared.items()}
    learner.fit(tasks["train"], tasks["validation"], settings=small.trainer)
    moved = {key for key, value in learner.meta_parameters.shared.items() if not torch.equal(value, before[key])}
    assert {key for key in before if key.endswith(("weight", "running_mean"))} <= moved
    assert learner.evaluate(tasks["validation"], num_tasks=2)["nll"].mean < 3


@pytest.mark.parametrize("source", ["mini_imagenet", "tiny_imagenet"])
@pytest.mark.parametrize("shots", [1, 5])
def test_the_settings_of_the_paper(source, shots):
    """Zhang et al. 2023, Table 1 and Fig. 3."""
    maml = get_recipe(f"{source}_5way_{shots}shot_maml_k5")
    for method, steps in (("maml_k5", 5), ("abml_k5", 5), ("ibaml_k5", 5), ("ibaml_k10", 10), ("ibaml_k15", 15)):
        recipe = get_recipe(f"{source}_5way_{shots}shot_{method}")
        assert (recipe.data, recipe.network, recipe.trainer) == (maml.data, maml.network, maml.trainer)
        assert (recipe.data.num_ways, recipe.data.num_shots) == (5, shots)
        assert recipe.data.num_queries == recipe.data.num_test_queries == 15
        assert recipe.data.image_size == recipe.network.arguments["image_size"] == 84
        assert recipe.network.arguments["channels"] == 32
        trainer, algorithm = recipe.trainer, recipe.algorithm
        assert (trainer.num_steps, trainer.tasks_per_step, trainer.learning_rate) == (40_000, 2, 1e-3)
        assert trainer.log_var_learning_rate is None and trainer.schedule == "constant"
        assert algorithm.inner == GradientDescent(num_steps=steps, learning_rate=1e-2)
        assert recipe.num_test_tasks == 1000
        network = recipe.learner().model.network
        assert sum(parameter.numel() for parameter in network.parameters()) == 32_901
        if algorithm.name == "maml":
            assert (algorithm.estimator, algorithm.is_bayesian) == ("unrolled", False)
            continue
        assert algorithm.estimator == ("unrolled" if algorithm.name == "abml" else "implicit")
        assert getattr(algorithm, "outer", "elbo") == "elbo" and algorithm.temperature == 0.01
        assert (algorithm.num_samples, algorithm.num_evaluation_samples) == (5, 10)
        assert algorithm.prior == DiagonalPrior(initial_log_var=(-10, -9))
        if algorithm.name == "ibaml":
            assert (algorithm.linear, algorithm.precondition) == (CG(max_steps=5), False)
        assert algorithm.hyper_prior_weight == pytest.approx(0.01 / (5 * (shots + 15) * 40_000))


@pytest.mark.parametrize("shots", [1, 5])
def test_the_inner_solver_is_stable_where_it_starts(shots):
    """Gradient descent on the KL divergence alone diverges above a step size of ``2 D / lam``."""
    for suffix in ("", "_laptop"):
        recipe = get_recipe(f"tiny_imagenet_5way_{shots}shot_ibaml_k15{suffix}")
        algorithm = recipe.algorithm
        smallest = torch.tensor(algorithm.prior.initial_log_var[0]).exp().item()
        assert algorithm.inner.learning_rate * algorithm.temperature / (5 * shots) < 2 * smallest


def test_the_laptop_scale_differs_in_size_and_speed_alone():
    for shots in (1, 5):
        for method in ("maml_k5", "abml_k5", "ibaml_k5", "ibaml_k10", "ibaml_k15"):
            paper, laptop = (
                get_recipe(f"mini_imagenet_5way_{shots}shot_{method}{suffix}") for suffix in ("", "_laptop")
            )
            assert dataclasses.replace(laptop.data, image_size=84) == paper.data
            assert paper.algorithm.inner.num_steps == laptop.algorithm.inner.num_steps
            changed = {"num_samples", "inner", "prior"}
            for field in dataclasses.fields(paper.algorithm):
                if field.name not in changed:
                    assert getattr(paper.algorithm, field.name) == getattr(laptop.algorithm, field.name), field.name
            assert paper.trainer.tasks_per_step == laptop.trainer.tasks_per_step
            assert laptop.num_test_tasks == paper.num_test_tasks


def image_folder(path, channels="RGB") -> None:
    for split in ("train", "validation", "test"):
        for name in ("cat", "dog", "owl"):
            folder = path / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                shade = 60 * index + 10 * len(split)
                Image.new(channels, (6, 5), (shade, 40, 200)).save(folder / f"{index}.png")


def test_a_recipe_of_ones_own_images_trains(tmp_path):
    image_folder(tmp_path / "animals")
    recipe = get_recipe("glyphs_5way_5shot_ibaml").replace(
        {
            "name": "animals",
            "network.arguments.num_outputs": 2,
            "network.arguments.channels": 3,
            "network.arguments.in_channels": 3,
            "network.arguments.image_size": 16,
            "trainer.num_steps": 2,
            "trainer.tasks_per_step": 2,
            "trainer.schedule": "constant",
        }
    )
    images = ImageFolder(path="animals", image_size=16, num_ways=2, num_shots=1, num_queries=1, num_test_queries=2)
    recipe = dataclasses.replace(recipe, data=images)
    assert Recipe.from_json(recipe.to_json()) == recipe
    learner = recipe.learner().fit(recipe.data.sampler("train", data=tmp_path), settings=recipe.trainer)
    report = learner.evaluate(recipe.data.sampler("test", data=tmp_path), num_tasks=2)
    assert 0 <= report["accuracy"].mean <= 1


# Changing settings


CHANGES = {
    "algorithm.inner.num_steps": (10, "--algorithm.inner.num-steps 10"),
    "trainer.learning_rate": (2e-3, "--trainer.learning-rate 2e-3"),
    "trainer.gradient_clip": (None, "--trainer.gradient-clip None"),
    "trainer.schedule": ("cosine", "--trainer.schedule cosine"),
    "trainer.draws": ("per_task", "--trainer.draws per_task"),
    "trainer.fast": (False, "--trainer.no-fast"),
    "algorithm.antithetic": (True, "--algorithm.antithetic"),
    "algorithm.num_samples": (4, "--algorithm.num-samples 4"),
    "algorithm.prior.initial_log_var": ((-5.0, -4.5), "--algorithm.prior.initial-log-var -5 -4.5"),
    "network.arguments.hidden_sizes": ((3, 4), "--network.arguments.hidden-sizes 3 4"),
    "network.arguments.activation": ("tanh", "--network.arguments.activation tanh"),
    "adapt": (("head.*",), "--adapt head.*"),
    "freeze": (("features.0.*", "features.3.*"), "--freeze features.0.* features.3.*"),
    "num_test_tasks": (7, "--num-test-tasks 7"),
}


def parsed(recipe: Recipe, flags: list[str], **arguments) -> Recipe:
    return parse_flags(NoOptions(), recipe, flags, command="ibaml train", description="", **arguments)[1]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A command without options."""


def test_settings_are_changed_by_name_and_by_flags():
    recipe = get_recipe("sinusoid_5shot_ibaml")
    changed = recipe.replace({name: value for name, (value, _) in CHANGES.items()})
    assert parsed(recipe, " ".join(flags for _, flags in CHANGES.values()).split()) == changed
    assert changed.algorithm.inner.num_steps == 10 and changed.network.arguments["hidden_sizes"] == (3, 4)
    assert Recipe.from_json(changed.to_json()) == changed
    assert changed.learner().model.adapted.keys() == {"head.weight", "head.bias"}
    # All else is as it was, and the original untouched.
    assert recipe == get_recipe("sinusoid_5shot_ibaml") == recipe.replace({})
    assert changed.algorithm.temperature == recipe.algorithm.temperature


@pytest.mark.parametrize("name", RECIPES)
def test_no_flags_change_nothing(name):
    assert parsed(get_recipe(name), []) == get_recipe(name)


def test_flags_of_some_settings_alone(capsys):
    recipe = get_recipe("sinusoid_5shot_maml")
    only = ("data", "algorithm")
    assert parsed(recipe, ["--data.num-shots", "3"], only=only).data.num_shots == 3
    with pytest.raises(SystemExit):
        parsed(recipe, ["--trainer.num-steps", "3"], only=only)
    assert "Unrecognized options: --trainer.num-steps" in capsys.readouterr().err


def test_a_refused_value_of_a_flag():
    with pytest.raises(ValueError, match="num_steps must be at least 1, but is 0"):
        parsed(get_recipe("sinusoid_5shot_maml"), ["--trainer.num-steps", "0"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainr.num_steps", 3, "no setting 'trainr.num_steps'; did you mean 'trainer.num_steps'?"),
        ("trainer.num_step", 3, "no setting 'trainer.num_step'; did you mean 'trainer.num_steps'?"),
        # The misspelt part alone is replaced, even where the other parts contain it.
        ("data.num_way", 3, "no setting 'data.num_way'; did you mean 'data.num_ways'?"),
        ("likelihood.name", "x", "there is no setting 'likelihood.name'."),
        ("network.arguments.channels.x", 3, "there is no setting 'network.arguments.channels.x'."),
        ("network.arguments.width", 3, "Conv4 has no argument width; there are num_outputs, "),
        ("network.name", "Conv5", "network name must be one of Conv4, MLP, RadialBasis, ResNet12, but is 'Conv5'."),
        ("trainer.num_steps", 0, "num_steps must be at least 1, but is 0."),
        ("algorithm.inner.num_steps", -1, "num_steps must be at least 1, but is -1."),
    ],
)
def test_refused_changes(key, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_recipe("glyphs_5way_5shot_maml").replace({key: value})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("glyphs_5way_5shot_ibamel", "glyphs_5way_5shot_ibaml"),
        ("omniglot_5way_1shot_mam", "omniglot_5way_1shot_maml"),
        ("sinusoid_10shots_abml", "sinusoid_10shot_abml"),
    ],
)
def test_an_unknown_recipe(name, nearest):
    message = f"there is no recipe {name!r}; did you mean {nearest!r}? `ibaml recipes` lists all."
    with pytest.raises(ValueError, match=re.escape(message)):
        get_recipe(name)


@pytest.mark.parametrize("change", ["no json", "[]", "5", '"text"', "{}", "without", "more", "none"])
def test_what_is_no_recipe(change):
    values = json.loads(get_recipe("sinusoid_5shot_maml").to_json())
    if change == "without":
        del values["algorithm"]["type"]
    elif change == "more":
        values["trainer"]["patience"] = 3
    elif change == "none":
        values["network"]["arguments"] = None
    text = json.dumps(values) if change in ("without", "more", "none") else change
    with pytest.raises(ValueError, match="this is no recipe of this version of ibaml: "):
        Recipe.from_json(text)


def test_a_recipe_with_a_refused_value():
    values = json.loads(get_recipe("sinusoid_5shot_maml").to_json())
    values["trainer"]["num_steps"] = 0
    with pytest.raises(ValueError, match="num_steps must be at least 1, but is 0"):
        Recipe.from_json(json.dumps(values))
