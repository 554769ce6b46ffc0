"""A prior without training tasks, from the spread of features."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from ibaml import MetaLearner
from ibaml.backbones import Backbone

NUM_FEATURES = 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "cache"))


def points(num_classes=8, num_points=10):
    rng = np.random.default_rng(0)
    centres = 5 + 4 * rng.normal(size=(num_classes, 1, NUM_FEATURES))
    return (centres + 0.3 * rng.normal(size=(num_classes, num_points, NUM_FEATURES))).astype(np.float32)


def fitted(inputs, **settings):
    backbone = Backbone(module=lambda x: x, square_root=False, **settings)
    return MetaLearner(backbone=backbone, classes="per_task").fit_prior(inputs)


def test_the_prediction_is_bayes_rule_with_the_spread_of_the_inputs():
    data = points()
    inputs = data[:4].reshape(-1, NUM_FEATURES)
    posterior = fitted(inputs).adapt(data[5:7, :3].reshape(-1, NUM_FEATURES), ["a"] * 3 + ["b"] * 3)
    query = data[5:7, 3:].reshape(-1, NUM_FEATURES)
    prediction = posterior.predict(query)

    def scaled(x):
        return (x.astype(np.float64) - inputs.astype(np.float64).mean(0)) / inputs.astype(np.float64).std(0)

    sigma2 = 0.3 * np.sqrt(NUM_FEATURES)
    logs = []
    for support in scaled(data[5:7, :3]):
        variance = 1 / (1 + 3 / sigma2)
        mean = 3 * variance / sigma2 * support.mean(0)
        logs.append(-0.5 * ((scaled(query) - mean) ** 2 / (variance + sigma2)).sum(1))
    expected = 1 / (1 + np.exp(logs[1] - logs[0]))
    np.testing.assert_allclose(prediction.probs[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_an_input_of_another_class_looks_like_none_of_these():
    data = points()
    posterior = fitted(data.reshape(-1, NUM_FEATURES)).adapt(
        data[[0, 1], :4].reshape(-1, NUM_FEATURES), [0] * 4 + [1] * 4
    )
    own, other = (posterior.predict(data[one, 4:].reshape(-1, NUM_FEATURES)).out_of_task for one in ([0, 1], [5, 6]))
    assert own.max() < other.min()


def test_of_a_folder_of_photos_and_saved(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "photos" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(20, 235, size=3)
        pixels = np.clip(colour + rng.integers(-20, 20, size=(9, 7, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number % 2}{number:02}.png")
    torch.manual_seed(0)
    backbone = Backbone(module=nn.Sequential(nn.Conv2d(3, NUM_FEATURES, 3), nn.ReLU()), image_size=8)
    console = Console(file=StringIO())
    learner = MetaLearner(backbone=backbone, classes="per_task")
    assert learner.fit_prior(tmp_path / "photos", progress=console) is learner
    assert "No tasks were learned from: the prior is the spread of 6 features over 20 inputs" in console.file.getvalue()
    flat = MetaLearner(backbone=backbone, classes="per_task").fit_prior(tmp_path / "flat")
    torch.testing.assert_close(flat.preprocessing.inputs.mean, learner.preprocessing.inputs.mean)
    x = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = learner.adapt(x[:3], ["a", "b", "c"]).predict(x[3:]).probs
    loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=backbone)
    assert torch.equal(loaded.adapt(x[:3], ["a", "b", "c"]).predict(x[3:]).probs, expected) and expected.shape == (3, 3)


class TestRefused:
    def test_no_backbone(self):
        with pytest.raises(TypeError, match="fit_prior needs a backbone, whose features make the prior"):
            MetaLearner(classes="per_task").fit_prior(points()[0])

    @pytest.mark.parametrize("settings", [{}, {"likelihood": "gaussian", "classes": "per_task"}])
    def test_classes_that_tasks_share(self, settings):
        with pytest.raises(ValueError, match="fit_prior is for classes that each task has of its own"):
            MetaLearner(backbone=nn.Identity(), **settings).fit_prior(points()[0])

    def test_few_inputs(self):
        with pytest.raises(ValueError, match="inputs has 10 inputs, but the spread of features needs at least 20"):
            fitted(points()[0])

    def test_no_spread(self):
        with pytest.raises(ValueError, match="all inputs have the same features"):
            fitted(np.ones((30, 2), dtype=np.float32))


def test_static_vectors_of_words_tell_topics_apart():
    """Three topics, three examples of each, nothing learned but the spread of the vectors over some sentences."""
    wordllama = pytest.importorskip("wordllama")
    # Its tokenizer lies where it looks for a cache.
    vectors = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    topics = {
        "food": ["boil the pasta in salted water", "this soup needs onions and butter", "bake the bread for an hour"],
        "sport": ["the striker scored two goals", "she won the final tennis match", "the team lost the football game"],
        "money": ["the bank raised its interest rate", "pay the invoice by friday", "shares fell on the stock market"],
    }
    more = {
        "food": ["roast the potatoes with garlic", "a cake with chocolate and cream"],
        "sport": ["the goalkeeper saved a penalty", "he ran the marathon in three hours"],
        "money": ["my mortgage payment is too high", "the company reported a large profit"],
    }
    texts = [text for of_topic in (*topics.values(), *more.values()) for text in of_topic]
    unlabelled = [*texts, *(f"{text} today" for text in texts)]
    backbone = Backbone(module=vectors.embed, name="wordllama l2_supercat 256")
    learner = MetaLearner(backbone=backbone, classes="per_task").fit_prior(unlabelled)
    known = [(text, topic) for topic, of_topic in topics.items() for text in of_topic]
    posterior = learner.adapt([text for text, _ in known], [topic for _, topic in known])
    asked = [(text, topic) for topic, of_topic in more.items() for text in of_topic]
    prediction = posterior.predict([text for text, _ in asked])
    assert (prediction.labels == np.array([topic for _, topic in asked])).sum() >= 5
