"""Metrics on the disk: each row once, tied to the checkpoint, whatever becomes of TensorBoard."""

import shutil
import warnings
from pathlib import Path

import pytest

from ibaml.train.log import METRICS, TrainingLog, read_metrics


def write_rows(folder: Path, steps: range, running: object = None, *, first: int = 0) -> dict:
    with TrainingLog(folder, first, running) as log:
        for step in steps:
            log.add({"loss": step / 3})
            log.write(step, 0.5 * step)
            if step % 2 == 0:
                log.write(step, 0.5 * step, {"validation_nll": 1 / step})
        return log.running


def steps_of(folder: Path) -> list[float]:
    return [row["step"] for row in read_metrics(folder / METRICS) if "loss" in row]


def test_a_row_is_added_and_the_rest_left_alone(tmp_path, monkeypatch):
    with TrainingLog(tmp_path, 0) as log:
        log.write(1, 0.0, {"loss": 1 / 3})
        before = (tmp_path / METRICS).read_bytes()
        monkeypatch.setattr("ibaml.train.log.atomic_write", lambda path: pytest.fail("written anew"))
        log.write(2, 0.0, {"loss": 1e-30})
        assert (tmp_path / METRICS).read_bytes().removeprefix(before) == b"2,0.0,1e-30\r\n"
    assert read_metrics(tmp_path / METRICS)[0]["loss"] == 1 / 3


def test_a_new_column_or_a_lost_file_is_written_anew(tmp_path):
    with TrainingLog(tmp_path, 0) as log:
        log.write(1, 0.0, {"loss": 1.0})
        log.write(2, 0.0, {"nll": 2.0})
        (tmp_path / METRICS).unlink()
        log.write(3, 0.0, {"loss": 3.0})
    rows = [{"step": 1, "loss": 1}, {"step": 2, "nll": 2}, {"step": 3, "loss": 3}]
    assert read_metrics(tmp_path / METRICS) == [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_row_that_was_cut_off_is_no_row(tmp_path, cut):
    running = write_rows(tmp_path, range(1, 4))
    write_rows(tmp_path, range(4, 5), running, first=3)
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    write_rows(tmp_path, range(4, 7), running, first=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert sum("validation_nll" in row for row in read_metrics(path)) == 3


def test_a_changed_digit_is_noticed(tmp_path):
    running = write_rows(tmp_path, range(1, 5))
    path = tmp_path / METRICS
    whole = path.read_bytes().decode()
    for old, new in (("0.3333", "0.3334"), ("1,0.5", "1,0.6"), ("\n3,", "\n2,"), ("1.5,1.0,\r\n", "1.5,,1.0\r\n")):
        assert old in whole
        path.write_text(whole.replace(old, new, 1), newline="")
        with pytest.raises(ValueError, match=r"metrics.csv is damaged \(it was changed since training wrote it\)"):
            TrainingLog(tmp_path, 4, running)
    path.write_text("".join(whole.splitlines(keepends=True)[:-2]), newline="")
    with pytest.raises(ValueError, match="it was changed since training wrote it"):
        TrainingLog(tmp_path, 4, running)
    for nothing in ("", "step,seconds"):
        path.write_text(nothing)
        with pytest.raises(ValueError, match=r"metrics.csv is damaged \(it has not one whole line\)"):
            TrainingLog(tmp_path, 4, running)
    path.unlink()
    write_rows(tmp_path, range(5, 6), running, first=4)
    assert steps_of(tmp_path) == [5]


def test_a_folder_of_tensorboard_that_is_removed_is_made_again(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TrainingLog(tmp_path, 0) as log:
            log.write(1, 0.0, {"loss": 1.0})
            shutil.rmtree(tmp_path / "tensorboard")
            log.write(2, 0.0, {"loss": 1.0})
            assert len(list((tmp_path / "tensorboard").iterdir())) == 1
            shutil.rmtree(tmp_path / "tensorboard")
    assert steps_of(tmp_path) == [1, 2]


def test_tensorboard_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.warns(RuntimeWarning, match="tensorboard cannot be written .* gets no more of this training, which go"):
        log = TrainingLog(tmp_path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with log:
            log.write(1, 0.0, {"loss": 1.0})
    assert steps_of(tmp_path) == [1]
