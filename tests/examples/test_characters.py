"""The two examples on rendered characters, on networks and tasks as few and as small as still learn something."""

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from ibaml.types import Batch, Episode

SMALL = ["--channels", "8", "--num-tasks", "6"]


@pytest.fixture(autouse=True)
def _glyphs(monkeypatch: pytest.MonkeyPatch, glyph_cache) -> None:
    monkeypatch.setenv("IBAML_DATA", str(glyph_cache))


def number_after(name: str, text: str) -> float:
    found = re.search(rf"{name}\s+(-?[\d.]+)", text)
    assert found is not None, text
    return float(found[1])


def test_few_shot_characters_learns_and_draws(load_example: Callable[[str], ModuleType], tmp_path, capsys):
    picture = tmp_path / "reliability.png"
    load_example("few_shot_characters").main(["--steps", "2", "--out", str(picture), *SMALL])
    output = capsys.readouterr().out
    # Even a hardly trained prior learns from 25 labelled images.
    assert 0.4 < number_after("accuracy", output) <= 1
    assert 0 < number_after("nll", output) < 1.61
    assert 0 <= number_after("ECE of all answers", output) < 0.5
    assert re.search(r"One task: \d+ of 75 right", output)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unknown_characters_are_doubted(load_example: Callable[[str], ModuleType], capsys):
    load_example("new_classes_out_of_distribution").main(["--steps", "2", *SMALL])
    output = capsys.readouterr().out
    known, unknown, area = (float(n) for n in re.findall(r"total +([\d.]+) +([\d.]+) +([\d.]+)", output)[0])
    assert known < unknown < 1.61
    assert 0.55 < area <= 1
    everything, half = (float(re.findall(rf"{share}% +([\d.]+)", output)[0]) for share in (100, 50))
    assert 0.4 < everything < half <= 1


def test_unknown_classes_are_not_adapted_to(load_example: Callable[[str], ModuleType]):
    example = load_example("new_classes_out_of_distribution")
    labels = torch.arange(10)
    task = Episode(Batch(labels.double(), labels), Batch(labels.double().repeat(2), labels.repeat(2)))
    seen: dict[str, list[float]] = {"asked": []}

    class Recorder:
        def adapt(self, x, y):
            seen["adapted"] = x.tolist()
            assert y.tolist() == [0, 1, 2, 3, 4]
            return self

        def predict(self, x):
            seen["asked"].append(x.tolist())
            return example.ClassPrediction(torch.zeros(1, len(x), 5))

    _, _, answers = example.ask(Recorder(), task)
    assert seen["adapted"] == [0, 1, 2, 3, 4]
    assert seen["asked"] == [[0, 1, 2, 3, 4] * 2, [5, 6, 7, 8, 9] * 2]
    assert answers.tolist() == [0, 1, 2, 3, 4] * 2
