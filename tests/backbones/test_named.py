"""Backbones by the name of an object of a module."""

import sys

import pytest
import torch

from ibaml.backbones import import_backbone


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
