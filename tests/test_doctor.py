"""What ``ibaml doctor`` finds, against what was put there."""

import json

import numpy as np
import pytest
import torch

from ibaml import doctor
from ibaml.cli import main


@pytest.fixture
def found(monkeypatch, tmp_path):
    """The examination of an installation with one folder of data, without formulaic and with an old BoTorch."""
    (tmp_path / "images_background.zip").write_bytes(b"")
    (tmp_path / "features" / "0").mkdir(parents=True)
    for name in ("glyphs-v1-a-train.npz", "features/0/part.npz", "of_the_user.npz"):
        np.savez(tmp_path / name, x=np.zeros(10))
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "formulaic":
            raise doctor.metadata.PackageNotFoundError(name)
        return "0.9.1" if name == "botorch" else real(name)

    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    monkeypatch.setattr(doctor.metadata, "version", version)
    return doctor.examine()


def test_versions_devices_and_folders_are_found(found, tmp_path):
    assert found["versions"]["torch"] == torch.__version__
    assert found["missing"] == []
    assert found["devices"][0]["what"].startswith(f"{torch.get_num_threads()} threads of ")
    folder = found["folders"][0]
    made = [tmp_path / "glyphs-v1-a-train.npz", tmp_path / "features/0/part.npz"]
    assert folder["folder"] == str(tmp_path) and folder["writable"] and folder["exists"]
    assert folder["data"] == ["images_background.zip"]
    assert (folder["made"], folder["made_bytes"]) == (2, sum(path.stat().st_size for path in made))


def test_what_is_missing_is_named_with_its_command(found):
    features = {each["extra"]: each for each in found["features"]}
    assert features["formulas"]["missing"] == ["formulaic"]
    assert features["formulas"]["install"] == "pip install 'ibaml[formulas]'"
    assert features["botorch"]["missing"] == ["botorch>=0.17 (there is 0.9.1)"]
    assert features["tables"]["missing"] == [] and features["tables"]["install"] is None
    text = doctor.describe(found)
    assert "formulas such as score ~ ses + C(sector): needs formulaic: pip install 'ibaml[formulas]'" in text
    assert "made here: 2 files" in text


def test_an_extra_needs_what_its_extras_need():
    lines = ['ibaml[a]; extra == "b"', 'no-such-package>=1; extra == "a"', 'numpy>=1.26; extra == "b"']
    assert doctor.missing_of("b", [doctor.parse_requirement(line) for line in lines]) == ["no-such-package"]


@pytest.mark.parametrize("line", ["", "; extra == 'a'"])
def test_a_line_that_is_no_requirement_is_refused(line):
    with pytest.raises(ValueError, match="is no requirement; expected a name with bounds"):
        doctor.parse_requirement(line)


def test_every_extra_for_users_says_what_it_is_for():
    provided = set(doctor.metadata.metadata("ibaml").get_all("Provides-Extra") or ())
    assert provided - set(doctor.FEATURES) == {"bench", "dev", "test"}


def test_the_command_prints_json_and_fails_where_something_needed_is_missing(capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    assert caught.value.code == 0
    assert "torch" in json.loads(capsys.readouterr().out)["versions"]
    monkeypatch.setattr(doctor, "missing_of", lambda extra, requirements: [] if extra else ["torch>=2.11"])
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 1
    assert "MISSING: torch>=2.11" in capsys.readouterr().out
