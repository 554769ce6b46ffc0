"""Features of inputs, computed once and never stale."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibaml.backbones import Backbone, Extractor

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (12, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    return tmp_path / "features"


class Counting(nn.Module):
    """A small convolutional network that counts the inputs that it sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))
        self.num_inputs = 0
        self.stop_after = None

    def forward(self, x):
        if self.stop_after is not None and self.num_inputs >= self.stop_after:
            raise KeyboardInterrupt
        self.num_inputs += len(x)
        return self.layers(x)


def extractor(module, **settings):
    return Extractor(Backbone(module=module, batch_size=4, **settings), CPU, inputs_of_a_part=4)


def of_tasks(module, *inputs, **settings):
    return extractor(module, **settings).features_of_tasks([("x", each) for each in inputs])


class TestFeatures:
    def test_are_those_of_the_module_in_evaluation_mode(self):
        module = Counting()
        before = copy.deepcopy(module.state_dict())
        expected = copy.deepcopy(module).eval()(IMAGES / 255).mean((2, 3)).detach()
        np.testing.assert_allclose(extractor(module).features("x", IMAGES), expected, rtol=1e-5, atol=1e-6)
        found = of_tasks(module, IMAGES[:5], IMAGES[3:]).features
        np.testing.assert_allclose(found[0], expected[:5], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1], expected[3:], rtol=1e-5, atol=1e-6)
        assert all(part.training for part in module.modules())
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_recurrent_layers_and_checkpointing(self):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.LSTM(2, 3, batch_first=True)

            def forward(self, x):
                return checkpoint(self.layer, x, use_reentrant=False)

        module, x = Checkpointed(), torch.randn(6, 5, 2)
        expected = module.layer(x)[0].mean(1).detach()
        np.testing.assert_allclose(extractor(module).features("x", x), expected, rtol=1e-5, atol=1e-6)

    def test_mappings_are_keyword_arguments_and_their_mask_counts(self):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(9, 3)

            def forward(self, input_ids, attention_mask):
                return {"last_hidden_state": self.embedding(input_ids)}

        module = Encoder()
        x = {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]}
        weight = module.embedding.weight.detach()
        expected = torch.stack([(weight[1] + weight[2]) / 2, weight[3]])
        np.testing.assert_allclose(extractor(module).features("x", x), expected, rtol=1e-6)

    def test_text_of_several_tasks_in_batches(self):
        seen = []

        def encode(texts):
            seen.append(list(texts))
            return [[len(text), text.count("a")] for text in texts]

        found = of_tasks(encode, ["a", "bb", "a"], ["bb", "ccc", "dddd", "aa"]).features
        assert found[0].tolist() == [[1, 1], [2, 0], [1, 1]] and found[1][:2].tolist() == [[2, 0], [3, 0]]
        assert seen == [["a", "bb", "ccc", "dddd"], ["aa"]]

    def test_inputs_of_different_lengths_are_not_mixed(self):
        module = nn.LSTM(2, 3, batch_first=True)
        short, long = torch.randn(3, 4, 2), torch.randn(2, 7, 2)
        found = of_tasks(module, short, long).features
        np.testing.assert_allclose(found[1], module(long)[0].mean(1).detach(), rtol=1e-5, atol=1e-6)
        assert found[0].shape == (3, 3)

    def test_in_the_type_of_the_weights(self):
        module = nn.Linear(2, 3).double()
        x = torch.randn(4, 2)
        np.testing.assert_allclose(extractor(module).features("x", x), module(x.double()).detach(), rtol=1e-6)

    def test_progress(self):
        seen = []
        extractor(Counting()).features_of_tasks([("x", IMAGES[:10])], on_progress=lambda *numbers: seen.append(numbers))
        assert seen == [(4, 10), (8, 10), (10, 10)]

    def test_threads_get_what_one_gets(self):
        shared = extractor(Counting())
        expected, found = shared.features("x", IMAGES), [None] * 4

        def work(place):
            found[place] = shared.features("x", IMAGES)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(each, expected) for each in found)


class TestCache:
    def test_each_input_is_computed_once(self):
        module = Counting()
        first = of_tasks(module, IMAGES[:5], IMAGES[2:8])
        assert module.num_inputs == 8 and (first.num_inputs, first.num_known) == (8, 0)
        again = of_tasks(module, IMAGES[3:10])
        assert module.num_inputs == 10 and (again.num_inputs, again.num_known) == (7, 5)
        np.testing.assert_array_equal(again.features[0][:2], first.features[0][3:])
        assert again.num_bytes > first.num_bytes > 8 * 5 * 4
        assert str(again).startswith("Features of 7 inputs, 5 of them known before; 0.0 MB are kept on disk")

    def test_a_changed_pixel_is_another_input(self):
        module = Counting()
        before = of_tasks(module, IMAGES).features[0]
        changed = IMAGES.clone()
        changed[7, 0, 2, 2] ^= 128
        after = of_tasks(module, changed).features[0]
        assert module.num_inputs == 13
        assert [not np.array_equal(*rows) for rows in zip(before, after, strict=True)] == [n == 7 for n in range(12)]

    @pytest.mark.parametrize(
        "settings",
        [
            {"image_size": 7},
            {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
            {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 2.0)},
            {"name": "another"},
        ],
    )
    def test_other_settings_are_other_features(self, settings):
        module = Counting()
        of_tasks(module, IMAGES, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        found = of_tasks(module, IMAGES, **settings)
        assert found.num_known == 0 and module.num_inputs == 24
        expected = extractor(module, **settings).features("x", IMAGES)
        np.testing.assert_allclose(found.features[0], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.running_var"])
    def test_other_weights_are_other_features(self, name):
        module = Counting()
        before = of_tasks(module, IMAGES).features[0]
        module.state_dict(keep_vars=True)[name].data.mul_(1.5)
        found = of_tasks(module, IMAGES)
        assert found.num_known == 0 and not np.allclose(found.features[0], before)

    def test_an_interrupted_extraction_goes_on(self):
        module = Counting()
        module.stop_after = 8
        with pytest.raises(KeyboardInterrupt):
            of_tasks(module, IMAGES)
        module.stop_after = None
        found = of_tasks(module, IMAGES)
        assert module.num_inputs == 12 and found.num_known == 8
        np.testing.assert_allclose(found.features[0], extractor(module).features("x", IMAGES), rtol=1e-5, atol=1e-6)

    def test_off_by_a_flag(self, cache):
        module = Counting()
        own = extractor(module, cache=False)
        assert own.features_of_tasks([("x", IMAGES)]).num_bytes is None and not cache.exists()
        assert own.features_of_tasks([("x", IMAGES)]).num_known == 12

    def test_functions_without_a_name_are_kept_in_memory(self, cache):
        def double(x):
            return 2 * x

        own = extractor(double)
        own.features_of_tasks([("x", torch.ones(3, 2))])
        assert own.features_of_tasks([("x", torch.ones(3, 2))]).num_known == 1 and not cache.exists()
        of_tasks(double, torch.ones(3, 2), name="double")
        assert of_tasks(double, torch.ones(3, 2), name="double").num_known == 1 and cache.is_dir()


class TestSquareRoot:
    def test_of_features_that_are_never_negative(self):
        own = extractor(nn.Identity())
        features = [np.array([[0.0, 4.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])]
        found = own.choose_root(features)
        np.testing.assert_allclose(found[0], [[0.0, 1.0]])
        np.testing.assert_allclose(found[1], [[0.6**0.5, 0.8**0.5], [0.0, 0.0]])
        np.testing.assert_allclose(own.features("x", torch.tensor([[3.0, -4.0]])), [[0.6**0.5, -(0.8**0.5)]], rtol=1e-6)

    def test_not_of_others(self):
        own = extractor(nn.Identity())
        assert own.choose_root([np.array([[0.0, 4.0]]), np.array([[-1.0, 4.0]])])[0].tolist() == [[0.0, 4.0]]
        assert own.features("x", torch.tensor([[4.0]])).tolist() == [[4.0]]

    def test_as_one_wants(self):
        assert extractor(nn.Identity(), square_root=True).features("x", torch.tensor([[4.0]])).tolist() == [[1.0]]
        own = extractor(nn.Identity(), square_root=False)
        assert own.choose_root([np.array([[4.0]])])[0].tolist() == [[4.0]] and not own.square_root


class TestRefused:
    def test_weights_that_changed(self):
        module = nn.Linear(2, 3)
        own = extractor(module)
        module.load_state_dict(copy.deepcopy(module.state_dict()))
        assert own.features("x", torch.ones(1, 2)).shape == (1, 3)
        with torch.no_grad():
            module.bias.add_(1)
        with pytest.raises(ValueError, match="backbone's weights have changed since the learner was fitted"):
            own.features("x", torch.ones(1, 2))

    def test_features_that_are_not_finite(self):
        with pytest.raises(ValueError, match="features that are not finite for X of task 'a'"):
            extractor(lambda x: x / 0).features("X of task 'a'", torch.ones(2, 3))


class TestRestore:
    def restored(self, backbone, **settings):
        stored = extractor(Counting(), **settings).settings()
        return Extractor.restore(stored, backbone, CPU, source="runs/a")

    def test_a_module_gets_the_stored_settings(self):
        found = self.restored(Counting(), image_size=7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
        assert found.backbone.size == (7, 7) and found.backbone.mean == (0.5, 0.4, 0.3)
        assert found.digest == extractor(Counting()).digest

    def test_another_module(self):
        module = Counting()
        module.layers[0].bias.data += 1
        own, other = extractor(Counting()).digest[:16], extractor(module).digest[:16]
        with pytest.raises(
            ValueError, match=f"backbone has the digest {other}, but the model of runs/a was .* of {own}"
        ):
            self.restored(module)

    def test_other_settings(self):
        with pytest.raises(ValueError, match=r"image_size=\(8, 8\), but the model of runs/a was trained with \(7, 7\)"):
            self.restored(Backbone(module=Counting(), image_size=8), image_size=7)

    def test_the_square_root_is_remembered(self):
        own = extractor(Counting())
        own.choose_root([np.ones((1, 2))])
        assert Extractor.restore(own.settings(), Counting(), CPU, source="runs/a").square_root
        with pytest.raises(ValueError, match="square_root=False, but the model of runs/a was trained with True"):
            Extractor.restore(own.settings(), Backbone(module=Counting(), square_root=False), CPU, source="runs/a")

    def test_none(self):
        with pytest.raises(
            ValueError, match=r"features of a backbone 'a' \(digest .*pass it, MetaLearner.load\(folder"
        ):
            self.restored(None, name="a")

    def test_one_too_many(self):
        assert Extractor.restore(None, None, CPU, source="runs/a") is None
        with pytest.raises(ValueError, match="backbone is given, but the model of runs/a was trained without one"):
            Extractor.restore(None, Counting(), CPU, source="runs/a")

    def test_a_function_without_a_name_cannot_be_told_from_another(self):
        stored = extractor(np.negative).settings()
        assert stored["digest"] is None
        assert Extractor.restore(stored, np.abs, CPU, source="runs/a").digest is None
        with pytest.raises(ValueError, match="backbone has the digest [0-9a-f]{16}, but .* unknown, as of a function"):
            Extractor.restore(stored, Counting(), CPU, source="runs/a")
