"""Backbones by name: of a publisher, with real architectures and random weights, or an object of a module."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch

from ibaml import MetaLearner
from ibaml.backbones import Backbone, Extractor, as_backbone, import_backbone, named_backbone
from ibaml.backbones.named import TextEncoder

CPU = torch.device("cpu")


def test_objects_of_installed_modules_and_of_files_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_backbones_of_a_test.py").write_text("class Held:\n    three = 3\n")
    before = list(sys.path)
    assert import_backbone("torch.nn.functional:relu") is torch.nn.functional.relu
    assert import_backbone("own_backbones_of_a_test:Held.three") == 3
    assert sys.path == before


@pytest.mark.parametrize("path", ["resnet", ":resnet", "module:"])
def test_what_is_no_name(path):
    with pytest.raises(ValueError, match=f"backbone is '{path}'; expected module:name, such as my_backbones:resnet"):
        import_backbone(path)


@pytest.mark.parametrize(("path", "why"), [("no_such_module:a", "No module named"), ("torch:no_such", "no attribute")])
def test_what_is_not_there(path, why):
    with pytest.raises(ValueError, match=f"backbone is '{path}', which cannot be imported from .*{why}"):
        import_backbone(path)


def installed(*packages: str) -> None:
    """Skips a test without them, or where they were built for another torch."""
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{package}: {error}")


class TestPublishers:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBAML_DATA", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def test_timm(self):
        installed("timm")
        found = named_backbone("timm:test_resnet", pretrained=False)
        assert found.name == "timm:test_resnet" and found.size == (160, 160)
        assert len(found.mean) == len(found.std) == 3
        pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
        features = Extractor(found, CPU).features("x", pixels)
        assert features.shape == (2, found.module.num_features)
        with pytest.raises(ValueError, match="backbone is 'timm:resnet81', and there is no such model; near"):
            import_backbone("timm:resnet81")

    def test_torchvision(self):
        installed("torchvision")
        found = as_backbone(named_backbone("torchvision:mobilenet_v3_small", pretrained=False))
        assert found.size == (224, 224) and found.mean == (0.485, 0.456, 0.406)
        assert Extractor(found, CPU).features("x", torch.zeros(1, 3, 224, 224)).shape == (1, 1024)
        with pytest.raises(ValueError, match="torchvision:squeezenet1_1 has no linear layer at its end"):
            named_backbone("torchvision:squeezenet1_1", pretrained=False)
        with pytest.raises(ValueError, match="no such model; near are mobilenet"):
            named_backbone("torchvision:mobilenet_v9")

    @pytest.fixture
    def encoder(self, tmp_path):
        """The folder of a tiny text encoder with random weights, as ``save_pretrained`` writes it."""
        installed("transformers")
        import transformers

        folder = tmp_path / "encoder"
        folder.mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "house"]
        (folder / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
        return folder

    def test_transformers(self, encoder):
        import transformers

        found = named_backbone(f"transformers:{encoder}")
        features = Extractor(found, CPU).features("x", ["a red house", "blue", "a red house"])
        assert features.shape == (3, 8)
        # Padding of a shorter text does not change it.
        np.testing.assert_allclose(features[0], features[2], rtol=1e-6)
        # Another tokenizer with the same weights is another backbone.
        again = named_backbone(f"transformers:{encoder}")
        assert found.digest() == again.digest()
        words = (encoder / "vocab.txt").read_text().replace("house", "garden")
        (encoder / "other.txt").write_text(words)
        other = TextEncoder(transformers.BertTokenizer(str(encoder / "other.txt")), again.module.encoder)
        assert Backbone(module=other, name=found.name).digest() != found.digest()
        alone = Extractor(found, CPU).features("x", ["blue"])
        np.testing.assert_allclose(features[1], alone[0], rtol=1e-4, atol=1e-5)

    def test_sentence_transformers(self, encoder):
        installed("sentence_transformers")
        text = ["a red house", "blue"]
        found = named_backbone(f"sentence-transformers:{encoder}")
        features = Extractor(found, CPU).features("x", text)
        expected = Extractor(named_backbone(f"transformers:{encoder}"), CPU).features("x", text)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)

    def test_a_learner_takes_a_name(self, encoder, tmp_path):
        name = f"transformers:{encoder}"
        tasks = [(["a red", "blue house", "red", "blue"], [0, 1, 0, 1])] * 4
        learner = MetaLearner(backbone=name, classes="per_task").fit(tasks, num_steps=2)
        loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=name)
        posteriors = [each.adapt(["red", "blue"], [0, 1]).predict(["a red house"]).probs for each in (learner, loaded)]
        np.testing.assert_allclose(*posteriors, rtol=1e-6)

    def test_weights_that_cannot_be_had(self):
        installed("transformers")
        with pytest.raises(OSError, match="the weights of transformers:no/such cannot be had .OSError: "):
            named_backbone("transformers:no/such")
        with pytest.raises(ValueError, match="pretrained=False does not go with transformers:no/such"):
            named_backbone("transformers:no/such", pretrained=False)

    @pytest.mark.parametrize("publisher", ["timm", "torchvision", "sentence-transformers", "transformers"])
    def test_packages_that_are_not_installed(self, publisher, monkeypatch):
        module = publisher.replace("-", "_")
        monkeypatch.setitem(sys.modules, f"{module}.models" if publisher == "torchvision" else module, None)
        with pytest.raises(ImportError, match=rf"this needs {publisher}, .* pip install 'ibaml\[{publisher}\]'"):
            named_backbone(f"{publisher}:any")

    def test_no_publisher(self):
        for name in ("resnet18", "timn:resnet18", "timm:"):
            with pytest.raises(ValueError, match=f"backbone is '{name}'; expected publisher:model with one of timm"):
                MetaLearner(backbone=name)

    def test_module_names_come_first_on_the_command_line_but_for_publishers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "own_module_of_a_test", types.SimpleNamespace(net=len))
        assert import_backbone("own_module_of_a_test:net") is len
