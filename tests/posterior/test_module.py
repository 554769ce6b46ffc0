"""Adapted tasks as plain modules: what they answer, differentiate to, and go through on the way out."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ibaml import MetaLearner, TaskPosterior
from ibaml.algorithms import ABML, make_algorithm
from ibaml.backbones import Backbone
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP, Conv4
from ibaml.priors import FullColumnPrior, LowRankColumnPrior
from ibaml.solvers.inner import GradientDescent
from ibaml.train import TrainerSettings

ONE_STEP = TrainerSettings(num_steps=1, tasks_per_step=2)
SCALES = np.array([1.0, 10.0, 1000.0])
STEPS = GradientDescent(num_steps=2, learning_rate=0.1)

CASES: dict[str, tuple[Any, Any, bool]] = {
    "linear_gaussian": (make_algorithm("linear_gaussian"), "gaussian", False),
    "full prior": (make_algorithm("linear_gaussian", prior=FullColumnPrior()), "gaussian", False),
    "low rank": (make_algorithm("linear_gaussian", prior=LowRankColumnPrior(rank=1)), "gaussian", False),
    "gp": (make_algorithm("gp"), "gaussian", False),
    "poisson": (make_algorithm("generalized_linear"), "poisson", False),
    "student_t": (make_algorithm("generalized_linear"), "student_t", False),
    "heteroscedastic": (make_algorithm("generalized_linear"), Gaussian(heteroscedastic=True), False),
    "softmax": (make_algorithm("softmax"), "categorical", True),
    "softmax at the mode": (make_algorithm("softmax", posterior_temperature=0.0), "categorical", True),
    "gaussian_classes": (make_algorithm("gaussian_classes"), "categorical", True),
    "prototypes": (make_algorithm("prototypes", centre=True), "categorical", True),
    "ridge": (make_algorithm("ridge"), "categorical", True),
    "neighbours": (make_algorithm("neighbours", num_neighbours=2), "categorical", True),
    "maml": (make_algorithm("maml", inner=STEPS), "categorical", True),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def data(*, is_classes: bool, num_rows: int = 14) -> tuple[np.ndarray, np.ndarray]:
    x = 5 + SCALES * np.random.default_rng(0).normal(size=(num_rows, 3))
    values = ((x - 5) / SCALES) @ [1.0, -1.0, 0.5]
    return x, np.arange(num_rows) % 3 if is_classes else np.round(np.exp(0.3 * values) * 3)


def adapted(case: str, num_support: int = 8) -> tuple[TaskPosterior, np.ndarray]:
    algorithm, likelihood, is_classes = CASES[case]
    num_outputs = 3 if is_classes else 2 if case == "heteroscedastic" else 1
    network = MLP(num_outputs, input_shape=3, hidden_sizes=(6,), activation="tanh", generator=generator())
    x, y = data(is_classes=is_classes)
    scope = "per_task" if is_classes else "shared"
    learner = MetaLearner(network, algorithm, likelihood, classes=scope).fit([(x, y)] * 2, settings=ONE_STEP)
    fitted = learner.fitted_model
    learner = learner.with_fitted(type(fitted)(**{**fields_of(fitted), "temperature": 1.3}))
    return learner.adapt(x[:num_support], y[:num_support]), x[num_support:]


def fields_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def answers(prediction: Any) -> list[np.ndarray]:
    values = [prediction.probs] if hasattr(prediction, "probs") else [prediction.mean, prediction.total_uncertainty]
    return [np.asarray(value) for value in values]


def outputs(found: Any) -> list[np.ndarray]:
    return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], rtol: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("case", CASES)
def test_predicts_what_the_posterior_does_and_is_exported_with_any_number_of_rows(case):
    posterior, x = adapted(case)
    module = posterior.to_module()
    assert_equal(outputs(module(torch.from_numpy(x))), answers(posterior.predict(x)))
    rows = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(module, (torch.from_numpy(x),), dynamic_shapes=rows).module()
    assert_equal(outputs(program(torch.from_numpy(x[:3]))), answers(posterior.predict(x[:3])))


@pytest.mark.parametrize(
    "case", ["full prior", pytest.param("softmax", marks=pytest.mark.slow), pytest.param("gp", marks=pytest.mark.slow)]
)
def test_onnx(case):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    posterior, x = adapted(case)
    example = torch.from_numpy(x)
    rows = {"x": {0: torch.export.Dim("rows")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of the exporter, about itself
        program = torch.onnx.export(posterior.to_module(), (example,), dynamo=True, verbose=False, dynamic_shapes=rows)
    stream = io.BytesIO()
    program.save(stream)
    session = runtime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x[:3]})
    assert_equal(found, answers(posterior.predict(x[:3])))


@pytest.mark.parametrize("num_support", [2, 14])
def test_both_forms_of_a_posterior_in_closed_form(num_support):
    posterior, _ = adapted("full prior", num_support)
    x = data(is_classes=False)[0]
    assert_equal(outputs(posterior.to_module()(torch.from_numpy(x))), answers(posterior.predict(x)))


@pytest.mark.parametrize("case", ["softmax", "linear_gaussian"])
def test_gradients_in_the_inputs_are_differences_of_predictions(case):
    posterior, x = adapted(case)
    module = posterior.to_module()
    inputs = torch.from_numpy(x).requires_grad_()
    found = module(inputs)
    value = found[:, 0] if isinstance(found, torch.Tensor) else found[0] + found[1]
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    step = 1e-2 * SCALES
    for column in range(3):
        ends = [answers(posterior.predict(x + sign * step * np.eye(3)[column])) for sign in (1, -1)]
        high, low = (end[0][:, 0] if len(end) == 1 else end[0] + end[1] for end in ends)
        expected = (high - low) / (2 * step[column])
        np.testing.assert_allclose(gradient[:, column], expected, rtol=0.02, atol=2e-3 * np.abs(expected).max())


def test_weights_of_the_whole_network_are_their_mean_or_samples():
    x, y = data(is_classes=True)
    network = MLP(3, input_shape=3, hidden_sizes=(6,), activation="tanh", generator=generator())
    algorithm = ABML(inner=STEPS, num_evaluation_samples=4)
    learner = MetaLearner(network, algorithm, classes="per_task").fit([(x, y)] * 2, settings=ONE_STEP)
    posterior, rows = learner.adapt(x[:8], y[:8]), torch.from_numpy(x[8:])
    module = posterior.to_module(num_samples=4, seed=3)
    assert_equal(outputs(module(rows)), answers(posterior.predict(x[8:], seed=3)))
    mean = posterior.to_module()
    assert len(mean.networks) == 1 and len(module.networks) == 4
    own = dict(mean.networks[0].named_parameters())
    assert all(torch.equal(own[name], value) for name, value in posterior.value.mean.items())
    with pytest.raises(TypeError, match="num_samples"):
        posterior.to_module(num_samples=0.5)


def test_state_is_in_buffers_and_the_learner_keeps_its_own():
    posterior, x = adapted("gaussian_classes")
    module = posterior.to_module()
    expected = outputs(module(torch.from_numpy(x)))
    again = copy.deepcopy(module)
    for value in again.state_dict().values():
        value.zero_() if value.is_floating_point() else None
    assert_equal(outputs(module(torch.from_numpy(x))), expected)
    again.load_state_dict(module.state_dict())
    assert_equal(outputs(again(torch.from_numpy(x))), expected, rtol=0)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_running_statistics_go_with_the_body():
    images = torch.rand(12, 3, 16, 16, generator=generator())
    labels = torch.arange(12) % 3
    network = Conv4(3, in_channels=3, image_size=16, channels=4, norm="running")
    from ibaml.types import Batch, Episode

    episode = Episode(Batch(images[:6], labels[:6]), Batch(images[6:], labels[6:]))
    learner = MetaLearner(network, "gaussian_classes", classes="per_task").fit([episode] * 2, settings=ONE_STEP)
    posterior = learner.adapt(images[:6], labels[:6])
    assert_equal(outputs(posterior.to_module()(images[6:])), answers(posterior.predict(images[6:])))


class TestBackbones:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBAML_DATA", str(tmp_path))

    def learned(self, backbone: Any, inputs: Any) -> TaskPosterior:
        learner = MetaLearner(backbone=backbone, classes="per_task").fit_prior(inputs)
        support = {name: value[:6] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:6]
        return learner.adapt(support, np.arange(6) % 3)

    def test_images(self):
        pixels = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator())
        layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
        backbone = Backbone(module=layers, image_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        posterior = self.learned(backbone, pixels)
        module = posterior.to_module()
        assert_equal(outputs(module(pixels[6:])), answers(posterior.predict(pixels[6:])), rtol=1e-5)
        images = (pixels[6:] / 255).requires_grad_()
        (gradient,) = torch.autograd.grad(module(images)[:, 0].sum(), images)
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0
        program = torch.export.export(module, (images.detach(),)).module()
        assert_equal(outputs(program(images.detach())), answers(posterior.predict(pixels[6:])), rtol=1e-5)
        with pytest.raises(ValueError, match=r"height and width \(4, 4\), but the module takes \(8, 8\): resize"):
            module(pixels[:, :, :4, :4])

    def test_several_inputs(self):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(20, 4)

            def forward(self, input_ids, attention_mask):
                return {"last_hidden_state": self.embedding(input_ids)}

        source = generator()
        ids = torch.randint(0, 20, (24, 5), generator=source)
        mask = (torch.rand(24, 5, generator=source) > 0.3).long()
        mask[:, 0] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        posterior = self.learned(Encoder(), inputs)
        asked = {name: value[6:] for name, value in inputs.items()}
        found = outputs(posterior.to_module()(asked))
        assert_equal(found, answers(posterior.predict(asked)), rtol=1e-5)

    def test_of_features_where_the_backbone_is_a_function(self):
        rows = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)

        def double(x):
            return 2 * x

        posterior = self.learned(Backbone(module=double, name="double"), rows)
        module = posterior.to_module(of_features=True)
        assert_equal(outputs(module(torch.from_numpy(2 * rows))), answers(posterior.predict(rows)), rtol=1e-5)
        with pytest.raises(ValueError, match="the backbone is a function, which a module cannot hold"):
            posterior.to_module()


class TestRefused:
    def test_samples_where_there_are_none(self):
        with pytest.raises(
            ValueError, match="num_samples is 4, but algorithm 'gp' predicts from its posterior without"
        ):
            adapted("gp")[0].to_module(num_samples=4)
        with pytest.raises(ValueError, match="num_samples is 4, but algorithm 'maml' has one set of weights"):
            adapted("maml")[0].to_module(num_samples=4)

    def test_features_without_a_backbone(self):
        with pytest.raises(ValueError, match="of_features=True, but the learner has no backbone"):
            adapted("gp")[0].to_module(of_features=True)

    def test_columns_that_are_no_numbers(self):
        pandas = pytest.importorskip("pandas")
        x, y = data(is_classes=False)
        table = pandas.DataFrame({"a": x[:, 0], "kind": ["one", "two"] * 7, "y": y, "task": [0] * 7 + [1] * 7})
        learner = MetaLearner(likelihood="gaussian", algorithm="linear_gaussian").fit(
            table, task="task", target="y", num_steps=1
        )
        with pytest.raises(ValueError, match="column 'kind' holds categories or gaps, but the inputs of a module are"):
            learner.adapt(table[["a", "kind"]], table["y"]).to_module()
