"""What networks may take and return: each kind learns and predicts, frozen and fine-tuned, or says what to do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibaml import Batch, Episode, MetaLearner
from ibaml.backbones import Backbone, Extractor
from ibaml.train import TrainerSettings

SETTINGS = TrainerSettings(num_steps=2, tasks_per_step=2, fine_tune_learning_rate=1e-2)
LABELS = np.arange(12) % 2
RNG = np.random.default_rng(0)
IDS, MASK = RNG.integers(0, 9, (12, 5)), np.ones((12, 5), np.int64)
MASK[::3, 3:] = 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))


def numbers(*shape: int) -> Any:
    return RNG.normal(size=(12, *shape)).astype(np.float32)


@dataclasses.dataclass
class Encoded:
    last_hidden_state: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()


class Two(nn.Module):
    """Two inputs of different shapes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(6, 4)

    def forward(self, x, z):
        return (self.first(x) * self.second(z.flatten(1))).tanh()


class Returning(nn.Module):
    def __init__(self, form: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.layer, self.form = nn.Linear(3, 4), form

    def forward(self, x):
        return self.form(self.layer(x).tanh())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)

    def forward(self, input_ids, attention_mask=None):
        padded = None if attention_mask is None else attention_mask == 0
        return self.encoder(self.embedding(input_ids), src_key_padding_mask=padded).mean(1)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.layer, self.use_reentrant = nn.Linear(3, 4), use_reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant).tanh()


# What makes the module, its inputs, and the features in what it returns.
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], torch.Tensor]]] = {
    "a tuple of inputs": (Two, (numbers(3), numbers(2, 3)), lambda out: out),
    "a mapping of inputs": (Two, {"z": numbers(2, 3), "x": numbers(3)}, lambda out: out),
    "a tuple of ids and mask": (Tokens, (IDS, MASK), lambda out: out),
    "ids": (Tokens, IDS, lambda out: out),
    "a tuple of outputs": (lambda: Returning(lambda f: (f, 2 * f)), numbers(3), lambda out: out[0]),
    "a dataclass of outputs": (lambda: Returning(Encoded), numbers(3), lambda out: out.last_hidden_state),
    "GRU": (lambda: nn.GRU(3, 4, batch_first=True), numbers(5, 3), lambda out: out[0].mean(1)),
    "LSTM": (lambda: nn.LSTM(3, 4, batch_first=True), numbers(5, 3), lambda out: out[0].mean(1)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True),
        numbers(5, 4),
        lambda out: out.mean(1),
    ),
    "checkpointing": (Checkpointed, numbers(3), lambda out: out),
}


def module_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]()


def rows(x: Any, chosen: slice) -> Any:
    if isinstance(x, dict):
        return {name: value[chosen] for name, value in x.items()}
    return tuple(value[chosen] for value in x) if isinstance(x, tuple) else x[chosen]


def tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: torch.from_numpy(value) for name, value in x.items()}
    return tuple(map(torch.from_numpy, x)) if isinstance(x, tuple) else torch.from_numpy(x)


def called(module: nn.Module, x: Any) -> Any:
    x = tensors(x)
    return module(**x) if isinstance(x, dict) else module(*x) if isinstance(x, tuple) else module(x)


class Network(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.body, self.features = module_of(kind), KINDS[kind][2]
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.features(self.body(x)))


@pytest.mark.parametrize("fine_tune", [(), ("*",)])
@pytest.mark.parametrize("kind", KINDS)
def test_as_a_backbone(kind, fine_tune, tmp_path):
    _, x, pick = KINDS[kind]
    module = module_of(kind)
    learner = MetaLearner(backbone=module, fine_tune=fine_tune, classes="per_task")
    learner.fit([(x, LABELS)] * 4, settings=SETTINGS)
    posterior = learner.adapt(rows(x, slice(0, 6)), LABELS[:6])
    asked = rows(x, slice(6, 12))
    answer = posterior.predict(asked).probs
    np.testing.assert_allclose(posterior.to_module()(tensors(asked)), answer, rtol=1e-4)
    loaded = MetaLearner.load(learner.save(tmp_path / "model"), backbone=module_of(kind))
    again = loaded.adapt(rows(x, slice(0, 6)), LABELS[:6]).predict(asked).probs
    np.testing.assert_allclose(again, answer, rtol=1e-6)
    module.eval()
    if fine_tune:
        learned = learner.meta_parameters.shared
        unmoved = [n for n, p in module.named_parameters() if torch.equal(p, learned[f"backbone.{n}"])]
        assert not unmoved
    else:
        features = learner.fitted_model.encode("x", asked)
        scale = learner.preprocessing.inputs
        expected = (pick(called(module, asked)).detach() - scale.mean) / scale.scale
        np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("freeze", [(), ("body.*",)])
@pytest.mark.parametrize("kind", [kind for kind, (_, x, _) in KINDS.items() if isinstance(x, np.ndarray)])
def test_as_a_network(kind, freeze):
    x = torch.from_numpy(KINDS[kind][1])
    y = torch.from_numpy(LABELS)
    tasks = [Episode(Batch(x[:6], y[:6]), Batch(x[6:], y[6:]))] * 4
    network = Network(kind).eval()
    learner = MetaLearner(network, freeze=freeze, classes="per_task").fit(tasks, settings=SETTINGS)
    body = {**learner.model.frozen, **learner.meta_parameters.shared}
    moved = [
        name for name, value in network.named_parameters() if "body" in name and not torch.equal(value, body[name])
    ]
    assert bool(moved) == (not freeze)
    module = learner.adapt(x[:6], y[:6]).to_module()
    answer = learner.adapt(x[:6], y[:6]).predict(x[6:]).probs
    np.testing.assert_allclose(module(x[6:]), answer, rtol=1e-4)
    np.testing.assert_allclose(answer.sum(1), 1, rtol=1e-5)


def test_ids_and_mask_in_one_tensor():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Tokens(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x[:, 0], x[:, 1]))

    x, y = torch.from_numpy(np.stack([IDS, MASK], 1)), torch.from_numpy(LABELS)
    episode = Episode(Batch(x[:6], y[:6]), Batch(x[6:], y[6:]))
    learner = MetaLearner(Reader(), classes="per_task").fit([episode] * 4, settings=SETTINGS)
    assert learner.adapt(x[:6], y[:6]).predict(x[6:]).probs.shape == (6, 2)


def test_tuples_hold_examples_where_these_are_as_many():
    """Pictures that somebody has collected in a tuple stay pictures."""
    pictures = tuple(numbers(3) for _ in range(12))
    found = Extractor(Backbone(module=nn.Flatten()), torch.device("cpu"))
    found.learn_form([(pictures, LABELS), (pictures, list(LABELS))])
    assert found.positions == 0 and found.features("x", pictures).shape == (12, 36)


def test_a_prior_without_tasks_of_several_inputs():
    x = tuple(np.concatenate([value, value + 1]) for value in KINDS["a tuple of inputs"][1])
    learner = MetaLearner(backbone=module_of("a tuple of inputs"), classes="per_task").fit_prior(x)
    known = tuple(value[:4] for value in x)
    assert learner.adapt(known, [0, 0, 1, 1]).predict(x).probs.shape == (24, 2)


class TestRefused:
    @pytest.mark.parametrize("build", [lambda: nn.LSTM(3, 4), lambda: nn.TransformerEncoderLayer(3, 1, 8, dropout=0.0)])
    @pytest.mark.parametrize("fine_tune", [(), ("*",)])
    def test_time_before_inputs(self, build, fine_tune):
        learner = MetaLearner(backbone=build(), fine_tune=fine_tune, classes="per_task")
        with pytest.raises(
            ValueError, match="changes with those beside it: .* takes the first axis for time.*batch_fir"
        ):
            learner.fit([(numbers(5, 3), LABELS)] * 3)

    def test_time_before_inputs_in_a_network(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.head = nn.TransformerEncoderLayer(3, 1, 8), nn.Linear(3, 2)

            def forward(self, x):
                return self.head(self.attention(x).mean(1))

        with pytest.raises(
            ValueError, match=r"the network \(Mixed\) returns .* attention.self_attn takes the first axis"
        ):
            MetaLearner(Mixed(), classes="per_task").fit([(numbers(5, 3), LABELS)] * 3)

    def test_transposed_in_forward(self):
        """The same layer is right where the module sees to it."""

        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.LSTM(3, 4)

            def forward(self, x):
                return self.layer(x.transpose(0, 1))[0].transpose(0, 1)

        assert Extractor(Backbone(module=Turned()), torch.device("cpu")).features("x", numbers(5, 3)).shape == (12, 4)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
    def test_reentrant_checkpointing_where_it_learns(self):
        tasks = [(numbers(3), LABELS)] * 3
        with pytest.raises(
            ValueError, match=r"fine_tune names .*layer.weight, but .* no gradient .*use_reentrant=False"
        ):
            MetaLearner(backbone=Checkpointed(True), fine_tune="*", classes="per_task").fit(tasks)
        network = Network("checkpointing")
        network.body.use_reentrant = True
        with pytest.raises(TypeError, match=r"activation checkpointing, no_grad, .*use_reentrant=False"):
            MetaLearner(network, classes="per_task").fit(tasks, settings=SETTINGS)

    def test_lists_of_inputs_and_other_types(self):
        learner = MetaLearner(backbone=Two(), classes="per_task")
        with pytest.raises(
            ValueError, match=r"backbone \(Two\) cannot process X of task '0', of shape .* are a tuple of"
        ):
            learner.fit([([numbers(3), numbers(3)], LABELS)] * 3)
        with pytest.raises(ValueError, match=r"'x' of shape \(12, 3\) and dtype torch.int64, 'z' of shape"):
            learner.fit([({"x": IDS[:, :3], "z": numbers(2, 3)}, LABELS)] * 3)

    def test_other_shapes_than_in_training(self):
        x = KINDS["a tuple of inputs"][1]
        learner = MetaLearner(backbone=Two(), fine_tune="*", classes="per_task")
        learner.fit([(x, LABELS)] * 3, settings=SETTINGS)
        with pytest.raises(ValueError, match=r"x_support has inputs of the form .*\(3, 2\).* but training had"):
            learner.adapt((x[0], numbers(3, 2)), LABELS)

    @pytest.mark.parametrize("x", [KINDS["a tuple of inputs"][1], KINDS["a mapping of inputs"][1]])
    def test_several_inputs_of_a_network(self, x):
        with pytest.raises(
            TypeError, match=r"X of task '0' is a .* inputs .*, but a network sees one array: .*backbone="
        ):
            MetaLearner(nn.Linear(3, 2), classes="per_task").fit([(x, LABELS)] * 3)

    def test_token_ids_as_numbers(self):
        with pytest.raises(ValueError, match=r"cannot process .* give token ids as Episodes of int64 tensors, or"):
            MetaLearner(Network("ids"), classes="per_task").fit([(IDS, LABELS)] * 3)

    def test_rows_that_are_no_inputs(self):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

            def forward(self, x):
                return self.head(self.body(x)[0][-1])

        with pytest.raises(ValueError, match=r"returned shape \(5, 2\) for .*\(recurrent layers: batch_first=True\)"):
            MetaLearner(Last(), classes="per_task").fit([(numbers(5, 3), LABELS)] * 3)
