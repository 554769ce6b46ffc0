"""Backbones that are learned in part: what moves and what stays, inputs of every form, and what is refused."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibaml import MetaLearner, SplitSettings
from ibaml.backbones import Backbone, FineTuned
from ibaml.data import Augmentation, EpisodeSampler, load_class_folder
from ibaml.data.augmentation import NormalisedAugmentation
from ibaml.train import TrainerSettings

SETTINGS = TrainerSettings(num_steps=3, tasks_per_step=2, fine_tune_learning_rate=1e-2)
LABELS = np.arange(12) % 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5))

    def forward(self, x):
        return self.last(self.first(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(3, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False).tanh()


class Tokens(nn.Module):
    """A transformer on token ids with a mask, whose outputs are named as those of ``transformers``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.1, batch_first=True)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"last_hidden_state": hidden, "pooler_output": None}


def numbers(*shape: int) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(12, *shape)).astype(np.float32), LABELS) for _ in range(4)]


def tokens() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    mask = np.ones((12, 5), np.int64)
    mask[::3, 3:] = 0
    return [({"input_ids": rng.integers(0, 30, (12, 5)), "attention_mask": mask}, LABELS) for _ in range(4)]


CASES: dict[str, tuple[Any, str, list[tuple[Any, Any]]]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), "layer.*", numbers(5, 3)),
    "GRU": (lambda: Recurrent(nn.GRU), "layer.weight_hh*", numbers(5, 3)),
    "activation checkpointing": (Checkpointed, "layer.weight", numbers(3)),
    "token ids and a mask": (Tokens, "encoder.*", tokens()),
}


def moved(before: nn.Module, learner: MetaLearner) -> set[str]:
    shared = learner.meta_parameters.shared
    weights = dict(before.named_parameters())
    learned = {name.removeprefix("backbone."): value for name, value in shared.items() if name.startswith("backbone.")}
    return {name for name, value in learned.items() if not torch.equal(value, weights[name])}


def rows(x: Any, chosen: slice) -> Any:
    return {name: value[chosen] for name, value in x.items()} if isinstance(x, dict) else x[chosen]


@pytest.mark.parametrize("case", CASES)
def test_what_matches_is_learned_and_the_module_stays_as_it_is(case, tmp_path):
    build, pattern, tasks = CASES[case]
    module = build()
    before = copy.deepcopy(module.state_dict())
    learner = MetaLearner(backbone=module, fine_tune=pattern, classes="per_task").fit(tasks, settings=SETTINGS)
    expected = {name for name, _ in module.named_parameters() if name.startswith(pattern.rstrip("*"))}
    assert moved(module, learner) == expected
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    frozen = learner.model.frozen
    assert set(frozen) == {f"backbone.{name}" for name, _ in module.named_parameters() if name not in expected}
    x, y = tasks[0]
    posterior = learner.adapt(rows(x, slice(0, 6)), y[:6])
    answer = posterior.predict(rows(x, slice(6, 12))).probs
    # One structure with other weights gives the same after loading.
    other = build()
    for parameter in other.parameters():
        parameter.data.zero_()
    loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=other)
    assert loaded.fine_tune == (pattern,)
    again = loaded.adapt(rows(x, slice(0, 6)), y[:6]).predict(rows(x, slice(6, 12))).probs
    np.testing.assert_allclose(again, answer, rtol=1e-6)
    asked = rows(x, slice(6, 12))
    tensors = {k: torch.from_numpy(v) for k, v in asked.items()} if isinstance(asked, dict) else torch.from_numpy(asked)
    np.testing.assert_allclose(posterior.to_module()(tensors), answer, rtol=1e-5)


def test_images_and_running_statistics():
    """Before the first step the network's features are those of the frozen backbone, scaled."""
    rng = np.random.default_rng(0)
    tasks = [(rng.integers(0, 256, (12, 3, 9, 9), np.uint8), LABELS) for _ in range(4)]
    module = Images()
    module.train()
    with torch.no_grad():
        module(torch.rand(8, 3, 9, 9))  # Moves the running averages off their start.
    backbone = Backbone(module=module, image_size=9, mean=(0.5,) * 3, std=(0.2,) * 3)
    still = TrainerSettings(num_steps=1, tasks_per_step=2, learning_rate=1e-9, fine_tune_learning_rate=1e-12)
    tuned = MetaLearner(backbone=backbone, fine_tune="last.*", classes="per_task").fit(tasks, settings=still)
    frozen = MetaLearner(backbone=backbone, classes="per_task").fit(tasks, settings=still)
    x, y = tasks[1]
    expected = frozen.adapt(x[:6], y[:6]).predict(x[6:]).probs
    np.testing.assert_allclose(tuned.adapt(x[:6], y[:6]).predict(x[6:]).probs, expected, rtol=1e-4)
    assert not tuned.model.statistics and tuned.model.examples_stand_alone
    network = tuned.network
    assert isinstance(network, FineTuned) and network.learned == {
        f"backbone.last.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }


def test_numbers_get_a_line_and_features_their_own_rate():
    tasks = [(x, x[:, 0] + 3) for x, _ in numbers(3)]
    module = Checkpointed()
    settings = TrainerSettings(num_steps=1, tasks_per_step=2, learning_rate=1e-6, fine_tune_learning_rate=0.5)
    learner = MetaLearner(likelihood="gaussian", backbone=module, fine_tune="*").fit(tasks, settings=settings)
    assert learner.algorithm.name == "linear_gaussian"
    # Adam's first step is as long as the learning rate.
    step = learner.meta_parameters.shared["backbone.layer.weight"] - module.layer.weight
    np.testing.assert_allclose(step.detach().abs(), 0.5, rtol=1e-3)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (10, 10, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


class TestAugmentation:
    """Images of training tasks change at every draw; scales are those of images as they are."""

    HOW = Augmentation(flip=True, crop=0.4, colour=0.3)

    def seen(self, tasks, *, has_scale=True, **changes):
        """Returns the images that the module gets when it is trained, and the learner."""
        images = []

        class Watched(Images):
            def forward(self, x):
                if torch.is_grad_enabled():
                    images.append(x.detach().clone())
                return super().forward(x)

        scale = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)} if has_scale else {}
        backbone = Backbone(module=Watched(), image_size=9, **scale)
        learner = MetaLearner(backbone=backbone, fine_tune="last.0.*")
        return learner.fit(tasks, settings=SETTINGS, **changes), images

    @pytest.mark.parametrize("has_scale", [True, False])
    def test_of_a_folder(self, photos, has_scale):
        splits = SplitSettings(num_ways=2, num_shots=2, num_query_images=2)
        changing = dataclasses.replace(splits, augmentation=self.HOW)
        plain, as_they_are = self.seen(photos, has_scale=has_scale, splits=splits)
        learner, changed = self.seen(photos, has_scale=has_scale, splits=changing)
        assert torch.equal(plain.model.network.feature_mean, learner.model.network.feature_mean)
        images = load_class_folder(photos, image_size=9).images / 255
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
        known = (images - mean) / std if has_scale else images

        def is_known(batches):
            return [bool((known - image).abs().amax((1, 2, 3)).min() < 1e-4) for batch in batches for image in batch]

        assert all(is_known(as_they_are)) and not any(is_known(changed[1:]))
        lowest, highest = (0 - mean) / std, (1 - mean) / std
        for batch in changed:
            low, high = (lowest, highest) if has_scale else (0.0, 1.0)
            assert bool(((batch >= low - 1e-5) & (batch <= high + 1e-5)).all())

    def test_of_a_sampler(self, photos):
        """It stays as it is, and frozen features refuse it."""
        images = load_class_folder(photos, image_size=9)
        sampler = EpisodeSampler(images, num_ways=2, num_shots=2, num_queries=2, augmentation=self.HOW)
        learner, changed = self.seen(sampler)
        again, once_more = self.seen(sampler)
        assert sampler.augmentation is self.HOW and all(map(torch.equal, changed, once_more))
        assert learner.meta_parameters.shared.keys() == again.meta_parameters.shared.keys()
        with pytest.raises(
            ValueError, match=r"augmentation changes images at every draw, .*fine_tune=\.\.\.\), or train"
        ):
            MetaLearner(backbone=Backbone(module=Images(), image_size=9)).fit(sampler)

    def test_of_normalised_images_is_that_of_their_pixels(self):
        images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        scaled = (images - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
        normalised = NormalisedAugmentation(**vars(self.HOW), mean=mean, std=std)
        found = normalised.apply(scaled, generator=torch.Generator().manual_seed(1))
        expected = self.HOW.apply(images, generator=torch.Generator().manual_seed(1))
        own = found * torch.tensor(std).reshape(3, 1, 1) + torch.tensor(mean).reshape(3, 1, 1)
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


def test_folders_of_images(photos):
    splits = SplitSettings(num_ways=2, num_shots=2, num_query_images=2)
    backbone = Backbone(module=Images(), image_size=9)
    learner = MetaLearner(backbone=backbone, fine_tune="last.0.*").fit(photos, splits=splits, settings=SETTINGS)
    assert moved(backbone.module, learner) == {"last.0.weight", "last.0.bias"}
    assert 0 <= learner.evaluate(photos, num_tasks=2)["accuracy"].mean <= 1


class TestRefused:
    def test_a_pattern_of_nothing(self):
        with pytest.raises(ValueError, match=r"'layr.\*' matches none of the backbone's .* Did you mean 'layer"):
            MetaLearner(backbone=Checkpointed(), fine_tune="layr.*").fit(numbers(3))

    def test_a_function(self):
        with pytest.raises(ValueError, match="fine_tune names parameters of an nn.Module, but .* is a function"):
            MetaLearner(backbone=np.tanh, fine_tune="*").fit(numbers(3))

    def test_no_backbone_or_a_network_of_ones_own(self):
        with pytest.raises(ValueError, match=r"fine_tune='\*' names parameters of a backbone, and there is none"):
            MetaLearner(fine_tune="*")
        learner = MetaLearner(nn.Linear(4, 2), backbone=Checkpointed(), fine_tune="*")
        with pytest.raises(ValueError, match="network stands on the features of a frozen backbone"):
            learner.fit(numbers(3))
        with pytest.raises(ValueError, match="fit_prior learns from no tasks"):
            MetaLearner(backbone=Checkpointed(), fine_tune="*", classes="per_task").fit_prior(numbers(3)[0][0])

    def test_text(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2))

            def forward(self, texts):
                return torch.tensor([[len(text), text.count("a")] for text in texts]).float() * self.weight

        tasks = [(["a", "bb", "ab", "bbb"], [0, 1, 0, 1])] * 3
        with pytest.raises(TypeError, match="holds text, but fine_tune trains the module that comes after"):
            MetaLearner(backbone=Reader(), fine_tune="*").fit(tasks)

    def test_other_inputs_than_in_training(self):
        _, pattern, tasks = CASES["token ids and a mask"]
        learner = MetaLearner(backbone=Tokens(), fine_tune=pattern, classes="per_task").fit(tasks, settings=SETTINGS)
        with pytest.raises(ValueError, match="x_support has inputs of the form .* but training had"):
            learner.adapt(tasks[0][0]["input_ids"], LABELS)

    def test_loading_without_a_module(self, tmp_path):
        learner = MetaLearner(backbone=Checkpointed(), fine_tune="*").fit(numbers(3), settings=SETTINGS)
        with pytest.raises(ValueError, match="has a fine-tuned backbone, whose structure is not stored: pass a module"):
            MetaLearner.load(learner.save(tmp_path / "model"))
