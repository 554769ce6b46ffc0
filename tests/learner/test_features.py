"""A learner on the features of a backbone: every form of tasks, adaptation, prediction and storage."""

import copy
import csv
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import ibaml
from ibaml import Batch, Episode, MetaLearner, SplitSettings
from ibaml.backbones import Backbone
from ibaml.cli import main
from ibaml.data import ClassImages, EpisodeSampler
from ibaml.learner.files import predict_files

SPLITS = SplitSettings(num_ways=2, num_shots=2, num_query_images=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU())


def backbone(seed=0, **settings):
    return Backbone(module=network(seed), image_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), **settings)


def pixels(num_classes=4, num_images=5, size=8):
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 200, size=(num_classes, 1, 3, 1, 1))
    return (colours + rng.integers(-30, 30, size=(num_classes, num_images, 3, size, size))).astype(np.uint8)


def class_images():
    images = pixels()
    return ClassImages(
        images=torch.from_numpy(images.reshape(-1, *images.shape[2:])),
        class_start=torch.arange(0, 21, 5),
        class_names=("a", "b", "c", "d"),
    )


@pytest.fixture
def folder(tmp_path):
    """Class folders of pictures of another size than the backbone's."""
    for name, images in zip("abcd", pixels(size=11), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def features_of(module, x):
    """The oracle: the module's own output in evaluation mode, with places averaged."""
    scaled = (torch.as_tensor(x) / 255 - 0.5) / 0.25
    return copy.deepcopy(module).eval()(scaled).mean((2, 3)).detach()


class TestForms:
    def test_a_folder_is_a_sampler_of_its_images(self, folder):
        own = backbone()
        learner = MetaLearner(backbone=own).fit(folder, splits=SPLITS, num_steps=2)
        images = ibaml.data.load_class_folder(folder, image_size=8)
        sampler = EpisodeSampler(images, num_ways=2, num_shots=2, num_queries=2)
        other = MetaLearner(backbone=own).fit(sampler, num_steps=2)
        report = learner.evaluate(folder, num_tasks=4)
        assert report == learner.evaluate(sampler, num_tasks=4) == other.evaluate(sampler, num_tasks=4)
        assert all(part.training for part in own.module.modules())

    @pytest.mark.parametrize("square_root", [None, False, True])
    def test_tasks_are_the_features_of_the_sampler_s_images_scaled(self, square_root):
        own = backbone(square_root=square_root)
        sampler = EpisodeSampler(class_images(), num_ways=2, num_shots=2, num_queries=2)
        learner = MetaLearner(backbone=own).fit(sampler, num_steps=1)
        features = features_of(own.module, class_images().images)
        # Rectified maps are not negative.
        features = features if square_root is False else (features / features.norm(dim=1, keepdim=True)).sqrt()
        scale = learner.preprocessing.inputs
        np.testing.assert_allclose(scale.mean, features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scale.scale, features.std(0, correction=0), rtol=1e-4)
        found = learner.fitted_model.encode("x", class_images().images)
        expected = (features - features.mean(0)) / features.std(0, correction=0)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

    def test_pairs_are_a_table_of_features(self):
        rng = np.random.default_rng(1)
        module = nn.LSTM(2, 3, batch_first=True)
        tasks = {name: (rng.normal(size=(9, 4, 2)).astype(np.float32), rng.normal(size=9)) for name in "abcd"}
        learner = MetaLearner(likelihood="gaussian", backbone=module).fit(tasks, num_steps=3)
        plain = {name: (module(torch.from_numpy(x))[0].mean(1).detach().numpy(), y) for name, (x, y) in tasks.items()}
        other = MetaLearner(likelihood="gaussian").fit(plain, num_steps=3)
        x, y = tasks["a"]
        found = learner.adapt(x[:4], y[:4]).predict(x[4:])
        expected = other.adapt(plain["a"][0][:4], y[:4]).predict(plain["a"][0][4:])
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-3, atol=1e-4)
        one, two = learner.learning_curve(tasks, [0, 3]), other.learning_curve(plain, [0, 3])
        np.testing.assert_allclose(one.scores["nll"][1].mean, two.scores["nll"][1].mean, rtol=1e-3)
        updated = learner.adapt(x[:2], y[:2]).update(x[2:4], y[2:4]).predict(x[4:])
        np.testing.assert_allclose(updated.mean, found.mean, rtol=1e-4, atol=1e-5)
        assert learner.adapt([], []).predict(x).mean.shape == (9,)

    def test_text(self):
        def count(texts):
            return [[text.count("a"), text.count("b"), len(text)] for text in texts]

        tasks = [(["aab", "abb", "aaa", "bbb", "aa", "b"], ["a", "b", "a", "b", "a", "b"])] * 10
        learner = MetaLearner(backbone=count).fit(tasks, validation_tasks=0.2, num_steps=20)
        prediction = learner.adapt(["aaaa", "bb"], ["a", "b"]).predict(["aaab", "bbba"])
        assert prediction.labels.tolist() == ["a", "b"]
        assert learner.calibrate(tasks).evaluate(tasks)["accuracy"].mean == 1.0

    def test_episodes_and_other_samplers(self, cache):
        sampler = EpisodeSampler(class_images(), num_ways=2, num_shots=2, num_queries=2)

        class Turned(EpisodeSampler):
            def sample(self, num_tasks, *, generator):
                drawn = super().sample(num_tasks, generator=generator)
                return Episode(*(Batch(batch.x.flip(-1), batch.y) for batch in drawn))

        turned = Turned(class_images(), num_ways=2, num_shots=2, num_queries=2)
        drawn = [turned.sample(1, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
        episodes = [Episode(*(Batch(batch.x[0], batch.y[0]) for batch in episode)) for episode in drawn]
        learner = MetaLearner(backbone=backbone()).fit(turned, num_steps=2)
        own = learner.fitted_model.encode("x", episodes[0].support.x)
        # Those of the first tasks gave the scale; what training draws is not kept.
        assert len(list(cache.glob("features/*/*.npz"))) == 1
        of_sampler = learner.evaluate_in_full(turned, num_tasks=1, seed=0).predictions[0]
        task = turned.sample(1, generator=ibaml.seeds.task_generator(0, 0))
        posterior = learner.fitted_model.adapt(task.support.x[0], task.support.y[0], seed=0)
        torch.testing.assert_close(posterior.predict(task.query.x[0]).probs, of_sampler.probs.float())
        assert own.shape == (4, 6)
        # Foreign queries are told by the classes that the sampler draws.
        assert 0 <= learner.evaluate(sampler, num_tasks=3, out_of_task=True)["out_of_task_auroc"].mean <= 1
        of_episodes = MetaLearner(backbone=backbone(), classes="per_task").fit(episodes, episodes, num_steps=2)
        assert of_episodes.evaluate(episodes)["accuracy"].mean > 0.5

    def test_shared_classes_of_episodes_keep_their_indices(self):
        rng = np.random.default_rng(2)
        batches = [Batch(torch.from_numpy(rng.normal(size=(8, 2))).float(), torch.tensor([0, 1] * 4)) for _ in range(6)]
        episodes = [Episode(batch, batch) for batch in batches]
        learner = MetaLearner(backbone=nn.Linear(2, 3)).fit(episodes, num_steps=2)
        assert learner.preprocessing.class_labels.tolist() == [0, 1]
        assert learner.adapt(batches[0].x, batches[0].y).predict(batches[0].x).probs.shape == (8, 2)

    def test_progress_says_what_is_kept(self, folder):
        console = Console(file=StringIO())
        for known in (0, 20):
            MetaLearner(backbone=backbone()).fit(folder, splits=SPLITS, num_steps=1, progress=console)
            assert f"Features of 20 inputs, {known} of them known before; 0.0 MB are kept" in console.file.getvalue()


TEXTS, LABELS = ["aab", "abb", "aaa", "bbb", "aa", "b"], ["a", "b", "a", "b", "a", "b"]


def counts(texts):
    return [[text.count("a"), text.count("b"), len(text)] for text in texts]


class TestTables:
    def test_a_column_of_text_is_pairs_of_lists(self, tmp_path):
        names = [f"task {number}" for number in range(5)]
        table = pd.DataFrame({"who": np.repeat(names, 6), "said": TEXTS * 5, "meant": LABELS * 5, "other": 0})
        named = Backbone(module=counts, name="counts")
        how = {"task": "who", "target": "meant", "features": ["said"], "num_steps": 3}
        learner = MetaLearner(backbone=named).fit(table, table, **how)
        pairs = {name: (TEXTS, LABELS) for name in names}
        expected = MetaLearner(backbone=named).fit(pairs, pairs, num_steps=3)
        answer = expected.adapt(TEXTS, LABELS).predict(["aaab", "bbba"]).probs
        # A table with columns in any order, others among them.
        asked = pd.DataFrame({"other": [1, 2], "said": ["aaab", "bbba"]})
        found = learner.adapt(table[:6], LABELS).predict(asked).probs
        np.testing.assert_allclose(found, answer)
        assert learner.evaluate(table) == expected.evaluate(pairs)
        loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=counts)
        np.testing.assert_allclose(loaded.adapt(table[:6], LABELS).predict(asked).probs, answer)
        with pytest.raises(ValueError, match="x_query has no column 'said', which the backbone reads; it has other"):
            learner.adapt(table[:6], LABELS).predict(asked[["other"]])

    def test_numbers_to_predict(self):
        table = pd.DataFrame({"task": np.repeat(list("abcd"), 6), "text": TEXTS * 4, "y": np.arange(24.0)})
        how = {"task": "task", "target": "y", "num_steps": 2}
        learner = MetaLearner(likelihood="gaussian", backbone=counts).fit(table, **how)
        assert learner.adapt(TEXTS, np.arange(6.0)).predict(table[:3]).mean.shape == (3,)
        assert learner.evaluate(table)["nll"].mean > -100


class TestRefused:
    def test_several_columns(self):
        table = pd.DataFrame({"task": ["a", "b"], "text": ["x", "y"], "more": [1, 2], "label": [0, 1]})
        with pytest.raises(ValueError, match="reads one column of a table, but there are text, more: name it"):
            MetaLearner(backbone=len).fit(table, task="task", target="label")
        with pytest.raises(TypeError, match="formula says what becomes of several columns, and a backbone reads one"):
            MetaLearner(backbone=len).fit(table, task="task", formula="label ~ text")
        with pytest.raises(TypeError, match="validation_tasks is a table, but tasks is none"):
            MetaLearner(backbone=len).fit([(["x", "y"], [0, 1])] * 2, table)

    def test_tables_where_training_had_none(self):
        learner = MetaLearner(backbone=counts).fit([(TEXTS, LABELS)] * 4, num_steps=1)
        table = pd.DataFrame({"task": "a", "text": TEXTS, "label": LABELS})
        with pytest.raises(TypeError, match="tasks is a table, but the model was trained on none"):
            learner.evaluate(table)
        with pytest.raises(TypeError, match="x_support is a table, but the backbone was given none in training"):
            learner.adapt(table, LABELS)

    def test_a_folder_without_a_size(self, folder):
        with pytest.raises(ValueError, match="the backbone has no image_size, to which the images of .* are resized"):
            MetaLearner(backbone=network()).fit(folder)

    def test_what_is_no_pair(self):
        with pytest.raises(TypeError, match=r"task '1' must be a pair \(X, y\), but is a int"):
            MetaLearner(backbone=nn.Linear(2, 3)).fit([(np.ones((3, 2)), [0, 1, 0]), 3])

    def test_weights_that_changed_since(self):
        own = backbone()
        sampler = EpisodeSampler(class_images(), num_ways=2, num_shots=2, num_queries=2)
        learner = MetaLearner(backbone=own).fit(sampler, num_steps=1)
        own.module[0].weight.data.zero_()
        own.module(torch.ones(2, 3, 8, 8))  # Moves the running averages, as training does.
        with pytest.raises(ValueError, match="weights have changed since the learner was fitted"):
            learner.adapt(class_images().images[:4], [0, 0, 1, 1])


class TestFolder:
    @pytest.fixture
    def saved(self, folder, tmp_path):
        learner = MetaLearner(backbone=backbone(), seed=3).fit(folder, splits=SPLITS, num_steps=2)
        assert learner.fitted_model.backbone.square_root
        return learner, learner.save(tmp_path / "model")

    def test_the_same_backbone_gives_the_same_predictions(self, saved, folder):
        learner, path = saved
        loaded = MetaLearner.load(path, backbone=network())
        assert loaded.evaluate(folder, num_tasks=3) == learner.evaluate(folder, num_tasks=3)
        assert loaded.backbone.size == (8, 8)
        assert not any(
            "Conv" in name or name.startswith("0.")
            for name in ibaml.learner.folder.load_tensors(path / "model.safetensors")[0]
        )

    def test_another_backbone_is_refused_with_both_digests(self, saved):
        learner, path = saved
        own, other = learner.backbone.digest()[:16], backbone(seed=1, name=None).digest()[:16]
        with pytest.raises(ValueError, match=f"backbone has the digest {other}, but the model of .* of {own}"):
            MetaLearner.load(path, backbone=network(seed=1))

    def test_no_backbone(self, saved):
        with pytest.raises(ValueError, match="holds a model on the features of a backbone .*load.folder, backbone=..."):
            MetaLearner.load(saved[1])

    def test_files_of_images(self, saved, folder, tmp_path):
        learner, _ = saved
        for part in ("known", "asked"):
            for name in "ab":
                target = tmp_path / part / (name if part == "known" else "")
                target.mkdir(parents=True, exist_ok=True)
                for number in (0, 1) if part == "known" else (2, 3):
                    image = Image.open(folder / name / f"{number}.png")
                    image.save(target / f"{name}{number}.png")
        count = predict_files(learner.fitted_model, tmp_path / "known", tmp_path / "asked", tmp_path / "out.csv")
        with (tmp_path / "out.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert count == 4 and [row["file"] for row in rows] == ["a2.png", "a3.png", "b2.png", "b3.png"]
        images = ibaml.data.load_class_folder(folder, image_size=8).images
        posterior = learner.adapt(images[[0, 1, 5, 6]], ["a", "a", "b", "b"])
        expected = posterior.predict(images[[2, 3, 7, 8]]).probs[:, 0]
        assert [float(row["probability_a"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)

    def test_the_command_line_names_the_backbone(self, saved, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        text = "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        layers = "nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU()"
        (tmp_path / "backbones_of_a_test.py").write_text(f"{text}own = nn.Sequential({layers})\n")
        files = ["--support", str(folder), "--query", str(folder / "a"), "--out", "out.csv", "--device", "cpu"]
        for arguments, code in ((["--backbone", "backbones_of_a_test:own"], 0), ([], 2)):
            with pytest.raises(SystemExit) as caught:
                main(["predict", "model", *files, *arguments])
            assert caught.value.code == code
        with open("out.csv") as file:
            assert [row["file"] for row in csv.DictReader(file)] == [f"{number}.png" for number in range(5)]
        assert "holds a model on the features of a backbone" in " ".join(capsys.readouterr().err.split())

    def test_files_without_a_size_of_images(self, tmp_path):
        batch = Batch(torch.randn(6, 2), torch.tensor([0, 1] * 3))
        learner = MetaLearner(backbone=nn.Linear(2, 3)).fit([Episode(batch, batch)] * 2, num_steps=1)
        with pytest.raises(ValueError, match="the model's backbone has no image_size, and of files"):
            predict_files(learner.fitted_model, tmp_path, tmp_path, tmp_path / "out.csv")


class TestDefaults:
    def test_classes_of_each_task_get_a_line_in_the_features(self):
        sampler = EpisodeSampler(class_images(), num_ways=2, num_shots=2, num_queries=2)
        learner = MetaLearner(backbone=backbone()).fit(sampler, num_steps=2)
        assert not list(learner.network.features.children())
        assert learner.algorithm.name == "gaussian_classes" and learner.algorithm.tied
        assert learner.choice is None
        images = class_images().images
        # Any number of classes, whatever training had.
        posterior = learner.adapt(images[[0, 1, 5, 6, 10]], ["a", "a", "b", "b", "c"])
        assert posterior.predict(images).probs.shape == (20, 3)

    def test_what_one_chooses_is_kept(self):
        sampler = EpisodeSampler(class_images(), num_ways=2, num_shots=2, num_queries=2)
        own = MetaLearner(backbone=backbone(), algorithm="prototypes").fit(sampler, num_steps=2)
        assert own.algorithm.name == "prototypes" and not list(own.network.features.children())
        line = nn.Linear(6, 2)
        assert MetaLearner(line, backbone=backbone()).fit(sampler, num_steps=2).network is line
