"""The examples on the library's defaults, with as few tasks and steps as still show what each is for."""

import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from ibaml import testing
from ibaml.algorithms import make_algorithm
from ibaml.types import Batch

Load = Callable[[str], ModuleType]


def test_chosen_measurements_tell_more_than_random_ones(load_example: Load, capsys):
    load_example("next_measurement").main(["--num-fields", "6"])
    rows = re.findall(r"^ +(\d) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    chosen, at_random = (np.array([float(row[column]) for row in rows]) for column in (1, 2))
    assert [row[0] for row in rows] == list("123456")
    # Below the noise no method can come, so the sixth measurement hardly tells them apart.
    assert chosen[:4].mean() < 0.8 * at_random[:4].mean()
    assert chosen[-1] < 0.5 * chosen[0]


def test_assays_are_told_apart_without_the_data(load_example: Load, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("IBAML_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_example("assays").main(["--num-assays", "40", "--steps", "30"])
    output = capsys.readouterr().out
    assert output.startswith("Made-up assays\n40 assays to learn from")
    accuracy, surest = map(float, re.findall(r"ibaml ([\d.]+), on the surest quarter ([\d.]+)", output)[0])
    assert 0.5 < accuracy < surest <= 1
    assert 0.5 < float(re.findall(r"logistic regression per assay ([\d.]+)", output)[0]) < 1


def test_assays_reads_those_of_fsmol(load_example: Load, monkeypatch, tmp_path):
    example = load_example("assays")
    monkeypatch.setattr(example, "NUM_ROWS", 4)
    arrays = {
        "task_name": np.array(["large", "small", "other"]),
        "task_split": np.array(["train", "train", "valid"]),
        "row_task": np.array([0] * 5 + [1] * 3 + [2] * 4),
        "row_mol": np.arange(12) % 5,
        "label": np.arange(12) % 2,
        "fp_ptr": np.arange(6),
        "fp_index": np.arange(5, dtype=np.uint16),
        "fp_count": np.full(5, 2, dtype=np.uint8),
    }
    np.savez(tmp_path / "fsmol_train_valid.npz", **arrays)
    ((x, y),) = example.from_fsmol("train", 9, tmp_path)
    assert x.shape == (4, 2048) and y.tolist() == ["inactive", "active", "inactive", "active"]
    np.testing.assert_allclose(x[np.arange(4), np.arange(4)], np.log(3), rtol=1e-6)


def test_photos_of_new_classes_and_of_none_of_them(load_example: Load, capsys):
    load_example("photos").main(["--steps", "20"])
    output = capsys.readouterr().out
    assert int(re.findall(r"known: (\d+)% of 45 others are right", output)[0]) >= 80
    own, foreign = (float(found) for found in re.findall(r": (-?[\d.]+)(?: on average;|$)", output, re.MULTILINE)[-2:])
    assert own < foreign


def test_topics_of_sentences(load_example: Load, capsys):
    pytest.importorskip("wordllama", reason="wordllama ships the vectors of words: pip install wordllama")
    load_example("text").main(["--steps", "20"])
    output = capsys.readouterr().out
    assert int(re.findall(r"known: (\d+)% of 45 others are right", output)[0]) >= 50
    assert output.count("'") == 6, "three sentences"


def test_shrunken_prototypes_by_hand(load_example: Load):
    example = load_example("own_algorithm")
    z = torch.tensor([[1.0, 0, 1], [3, 0, 1], [0, 2, 1]], dtype=torch.float64)
    prior = make_algorithm("prototypes").init_prior(3, 2, like=z)
    found, _ = example.Shrunken(strength=2.0).solve(prior, {}, Batch(z, torch.tensor([0, 0, 1])), 3)
    middle = torch.tensor([4 / 3, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(found.means[0], (torch.tensor([4.0, 0]) + 2 * middle) / 4)
    torch.testing.assert_close(found.means[1], (torch.tensor([0.0, 2]) + 2 * middle) / 3)
    assert found.means[2].tolist() == [0, 0] and found.counts.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="strength must be 0 or positive and finite, but is -1"):
        example.Shrunken(strength=-1)


def test_the_algorithm_of_ones_own_keeps_the_contract_and_is_trained(load_example: Load, capsys):
    example = load_example("own_algorithm")
    assert testing.failures(example.ShrunkenContract) == {}
    example.main(["--steps", "5", "--no-contract"])
    assert re.fullmatch(r"prototypes: accuracy .*\nshrunken: accuracy .*\n", capsys.readouterr().out)
