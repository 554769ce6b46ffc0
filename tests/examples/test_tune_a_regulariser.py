from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("tune_a_regulariser")


def test_gradients_agree_and_tuning_helps_on_the_test_set(example, capsys):
    example.main(["--steps", "40"])
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[-1]) < 1e-6
    before, after = ([float(number) for number in line.split()[-2:]] for line in lines if line.startswith("one "))
    assert after[0] < 0.7 * before[0]
    assert 1.0 < after[1] < 0.8 * before[1]


def test_training_is_solved_and_the_finite_differences_are_right(example):
    training, validation, _ = example.make_data(torch.Generator().manual_seed(1))
    strengths = torch.linspace(-3, 1, example.NUM_FEATURES, dtype=torch.float64)
    slope = torch.func.grad(example.training_loss)(example.train(strengths, training), strengths, training)
    assert slope.norm() < 1e-12
    # Autograd through the closed form: a third way to the same gradient.
    exact = torch.func.grad(lambda s: example.mean_squared_error(example.train(s, training), validation))(strengths)
    gradient, _ = example.hypergradient(strengths, training, validation)
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-9)
    differences = example.finite_differences(strengths, training, validation)
    torch.testing.assert_close(differences, exact, rtol=1e-5, atol=1e-8)
