"""What the tests of commands share: commands in an empty folder, and small evaluated runs."""

import shutil

import pytest
from tests.cli.small import SINUSOID, SMALL

from ibaml.cli import main


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def ibaml(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder and returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three small evaluated runs: two of the same tasks, one of a Gaussian algorithm among them, and one of others."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe, seed in (("a", SINUSOID, 0), ("b", "sinusoid_5shot_ibaml", 0), ("c", SINUSOID, 1)):
        for command in (
            ["train", recipe, "--run-folder", str(folder / name), "--steps", "4", "--device", "cpu", *SMALL],
            ["evaluate", str(folder / name), "--tasks", "5", "--seed", str(seed)],
        ):
            with pytest.raises(SystemExit) as caught:
                main(command)
            assert caught.value.code == 0
    return folder


@pytest.fixture
def run_of_its_own(trained, tmp_path):
    """A copy of the first of these runs, in the folder ``run`` of the command, to change and to damage."""
    return shutil.copytree(trained / "a", tmp_path / "run")
