"""What commands list, and what they refuse before any work."""

import pytest
import torch
from tests.cli.small import SINUSOID, train

from ibaml.recipes import RECIPES
from ibaml.train.devices import resolve_device


def test_recipes_are_listed(ibaml):
    code, output, _ = ibaml("recipes")
    assert code == 0
    lines = output.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(RECIPES)
    assert "60,000 steps of 8 tasks" in output


@pytest.mark.parametrize("columns", [80, 60])
def test_names_stay_whole_in_a_narrow_terminal(ibaml, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ibaml("recipes")[1].split()
    assert all(name in words for name in RECIPES)


@pytest.mark.parametrize("command", [(), ("train",), ("evaluate",), ("compare",), ("recipes",)])
def test_help(ibaml, command):
    code, output, _ = ibaml(*command, "--help")
    assert code == 0
    assert f"usage: ibaml {' '.join(command)}".rstrip() in output
    if command == ("train",):
        assert all(option in output for option in ("--run-folder", "--data", "--max-minutes", "--steps"))


@pytest.mark.parametrize("command", [("trian",), (), ("train",), ("train", SINUSOID, "--steps", "ten")])
def test_misspelt_commands_exit_with_two(ibaml, command):
    code, _, errors = ibaml(*command)
    assert code == 2
    assert errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "sinusoid_5shot_mam"),
            f"there is no recipe 'sinusoid_5shot_mam'; did you mean {SINUSOID!r}? `ibaml recipes` lists all.",
        ),
        (("train", SINUSOID, "--steps", "0"), "num_steps must be at least 1, but is 0."),
        (("train", SINUSOID, "--max-minutes", "0"), "max_minutes must be positive, but is 0"),
        (("train", SINUSOID, "--device", "quantum"), "device must be auto, cpu, cuda or cuda:N, but is 'quantum'."),
        (("train", SINUSOID, "--threads", "0"), "--threads must be at least 1, but is 0."),
        (("train", SINUSOID, "--network.arguments.input-shape", "2"), "cannot process training task support.x of"),
        (
            ("evaluate", "nowhere"),
            "nowhere has no model.safetensors: it holds no trained model, or a run that has not reached its first",
        ),
        (("compare", "one"), "compare needs at least two run folders, but got 1."),
        (("compare", "one", "two"), "one has not been evaluated: run `ibaml evaluate one` first."),
    ],
)
def test_refusals(ibaml, arguments, message):
    code, _, errors = ibaml(*arguments)
    assert code == 2
    assert message in errors
    assert "error: " in errors and "Traceback" not in errors


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(ibaml, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = ibaml("train", SINUSOID, "--device", device)
    assert code == 2
    assert f"device is {device!r}, but this torch finds no CUDA device(s): use cpu." in errors


def test_cuda_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:1', but this torch finds 1 CUDA device"):
        resolve_device("cuda:1")


def test_missing_data_says_where_it_was_looked_for(ibaml, tmp_path):
    code, _, errors = ibaml("train", "omniglot_5way_1shot_maml", "--data", tmp_path / "data")
    assert code == 2
    assert f"looked in {tmp_path / 'data'}" in errors
    assert not (tmp_path / "runs").exists()


def test_unwritable_run_folder(ibaml, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, errors = train(ibaml, tmp_path / "file" / "run")
    assert code == 2
    assert "file/run cannot be written (" in errors and "choose another with --run-folder" in errors


def test_types_of_python_are_not_in_the_help(ibaml):
    for command in ("train", "evaluate", "compare", "predict"):
        output = ibaml(command, "--help")[1]
        assert "--device DEVICE" in output and "{None}" not in output and "STR" not in output


def test_whoever_has_stopped_reading_is_told_nothing(ibaml, monkeypatch):
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("ibaml.cli.tools.describe", broken)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    code, output, errors = ibaml("doctor")
    assert (code, output, errors) == (0, "", "")
