"""One training in a folder at a time."""

import os
import subprocess
import sys
import threading

import pytest

from ibaml.train.lock import only_training_in

HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_holds_a_folder_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        refusal = f"another training is running in {tmp_path}: wait until it has ended, or choose another folder"
        with pytest.raises(OSError, match=refusal), only_training_in(tmp_path):
            pytest.fail("entered")
        holder.kill()
        holder.wait()
    with only_training_in(tmp_path):
        pass


def test_a_thread_may_hold_a_folder_again_and_others_may_not(tmp_path):
    refused: list[OSError] = []

    def other() -> None:
        try:
            with only_training_in(tmp_path / "run"):
                pass
        except OSError as error:
            refused.append(error)

    def in_another_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with only_training_in(tmp_path / "run"):
        with only_training_in(tmp_path / "run"):
            pass
        in_another_thread()
    assert "another training is running" in str(refused[0])
    in_another_thread()
    assert len(refused) == 1 and os.listdir(tmp_path / "run") == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    half = tmp_path / ".4711.0123abcd.checkpoint.safetensors"
    for path in (half, tmp_path / ".mine", tmp_path / "metrics.csv"):
        path.touch()
    with only_training_in(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "metrics.csv"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run_folder .*file/run cannot be written \(Not a directory\): choose another"):
        with only_training_in(tmp_path / "file" / "run"):
            pass


def test_nothing_to_hold():
    with only_training_in(None):
        pass


def test_names_that_are_no_text(tmp_path):
    folder = tmp_path / "bad\udcff"
    with pytest.raises(OSError, match=r"run_folder '.*bad\\udcff' has a name that is no text in UTF-8"):
        with only_training_in(folder):
            pass
    assert not folder.exists()
