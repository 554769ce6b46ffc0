"""Processes that share tasks: the same result as one process, one sum a step, and an end when one of them dies."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibaml import cli, tree
from ibaml.train import processes
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.evaluate import evaluate
from ibaml.train.log import METRICS, read_metrics
from ibaml.train.processes import Processes, ProcessLostError, is_told_by_first, placed, require_devices

SCRIPT = Path(__file__).with_name("two_processes.py")
_spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
two_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(two_processes)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """Waits for the end. A launcher out of time is asked to end, as only then it ends its processes as well."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            output = process.communicate(timeout=40)[0]
        finally:
            process.kill()
        pytest.fail(f"{process.args} did not end within {timeout} s:\n{output}")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], timeout: float = 10) -> bool:
    deadline = time.monotonic() + timeout
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def difference(one, other) -> float:
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def assert_same_checkpoints(one: Path, other: Path, tolerance: float) -> None:
    (first, about_first), (second, about_second) = load_tensors(one / CHECKPOINT), load_tensors(other / CHECKPOINT)
    assert first.keys() == second.keys()
    assert max(float((first[key].double() - second[key].double()).abs().max()) for key in first) < tolerance
    assert (about_first["step"], about_first["best_step"]) == (about_second["step"], about_second["best_step"])
    assert about_first["description"] == about_second["description"]
    assert torch.equal(first["generator"], second["generator"])


# One process


@given(st.integers(0, 200), st.integers(1, 20))
def test_shares_are_a_partition_into_nearly_equal_parts(count, size):
    shares = [Processes(rank=rank, size=size).share(count) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_does_everything_itself():
    alone, tensors = Processes(), {"a": torch.ones(2)}
    assert alone.is_first and alone.sum(tensors) is tensors
    assert alone.gather(lambda: 3) == [3] and alone.on_first(lambda: 4) == 4 and alone.first_then_others(lambda: 5) == 5
    assert alone.together(lambda: 6) == 6
    with pytest.raises(ValueError, match="mine") as caught:
        alone.on_first(lambda: (_ for _ in ()).throw(ValueError("mine")))
    assert not is_told_by_first(caught.value)


def test_without_torchrun_there_is_no_group(monkeypatch):
    # Variables that another launcher may have left behind.
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert (processes.num_launched(), processes.launched_rank()) == (1, 0)
    with processes.connect() as group:
        assert group == Processes() and not torch.distributed.is_initialized()


def test_ranks_are_below_the_size():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), the number of processes, but is 2\."):
        Processes(rank=2, size=2)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"devices must be at least 1, but is 0\."):
        require_devices(torch.device("cpu"), 0)
    with pytest.raises(ValueError, match=r"device is 'cuda:1', which names one device, but 2 processes need one each"):
        require_devices(torch.device("cuda:1"), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(torch.device("cuda"), 2)
    require_devices(torch.device("cpu"), 64)
    with pytest.raises(ValueError, match=r"devices is 3, but this torch finds 2 CUDA device\(s\) on this machine"):
        require_devices(torch.device("cuda"), 3)


def test_a_missing_fabric_is_named(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("RANK", 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"2 processes need Lightning Fabric, which is not installed: pip install 'ib"):
        processes.connect().__enter__()


# Two processes, which did everything in one go


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes found, by rank, and the folder that they worked in."""
    folder = tmp_path_factory.mktemp("together")
    two_processes.train(folder / "own_0" / "begun_by_one", None, "ibaml", num_steps=3)
    process = start(*TORCHRUN, 2, SCRIPT, "everything", folder)
    output = finish(process)
    assert process.returncode == 0, output
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(2)], folder


def test_sums(together):
    for found in together[0]:
        total = found["sum"]
        assert torch.equal(total["float32"], torch.tensor([2.0, 3.0]))
        assert total["float64"] == torch.tensor(1 / 3, dtype=torch.float64) + 2 / 3  # nothing is lost to float32
        assert total["bfloat16"].dtype == torch.bfloat16 and total["bfloat16"].tolist() == [3.0, 1.0]
        assert total["bool"].dtype == torch.bool and total["bool"].tolist() == [True, False]
        assert total["nan"].isnan() and total["empty"] == {}
        # 257 is no bfloat16, which has 256 and 258: 256 + 258 = 514 is one, as is each partial sum in float32.
        assert found["half"].tolist() == [(torch.tensor([257.0, 258.0]).bfloat16().float().sum()).bfloat16().item(), 2]


def test_gathered_and_sent_values(together):
    for rank, found in enumerate(together[0]):
        assert (found["rank"], found["size"]) == (rank, 2)
        assert [(one["rank"], one["value"].tolist()) for one in found["gather"]] == [(0, []), (1, [0])]
        assert found["on_first"] == "from 0" and found["together"] == rank + 5
        value, calls = found["first_then_others"]
        assert value == rank and calls == ([0, 0] if rank == 0 else [1])


def test_errors_are_agreed(together):
    """An error of one is raised in all, and the first process alone has to print it."""
    first, second = together[0]
    for found, told in ((first, False), (second, True)):
        assert found["gather_error"] == ("ValueError", "raised in process 1", told)
        name, message, is_told = found["on_first_error"]
        assert name == "FileNotFoundError" and "/nowhere/at/all" in message and is_told == told
        assert found["together_error"] == ("ValueError", "raised in process 1", told)
        name, message, is_told = found["unwritable"]
        assert name in ("OSError", "NotADirectoryError", "FileExistsError") and "cannot be written" in message
        assert is_told == told


@pytest.mark.parametrize("case", two_processes.CASES)
def test_the_result_is_that_of_one_process(together, tmp_path, case):
    found, folder = together
    name, changes = two_processes.CASES[case]
    alone = two_processes.train(tmp_path, None, name, **changes)
    start_meta = two_processes.trainer(None, None, name=name)._meta
    assert difference(alone.last_meta, start_meta) > 1e-2  # it did train
    for one in found:
        chosen, last_meta, num_steps, stop_reason, *_ = one["results"][case]
        assert max(difference(chosen.meta, alone.meta), difference(last_meta, alone.last_meta)) < 1e-10
        assert chosen.temperature == pytest.approx(alone.chosen.temperature, rel=1e-6)
        assert (num_steps, chosen.step, stop_reason) == (alone.num_steps, alone.best_step, "completed")
    # Not one bit apart, so that they stay together however long they run.
    assert difference(found[0]["results"][case][1], found[1]["results"][case][1]) == 0
    assert_same_checkpoints(tmp_path, folder / "own_0" / case, 1e-10)
    rows, expected = (read_metrics(path / METRICS) for path in (folder / "own_0" / case, tmp_path))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"seconds", "tasks_per_second"}:
            assert row[key] == pytest.approx(other[key], rel=1e-9, abs=1e-9), key


def test_running_statistics_are_agreed(together):
    """Each process normalises by its own tasks, and all move to the mean over the tasks of a step."""
    ours, theirs = (one["running"][1] for one in together[0])
    assert difference(ours, theirs) == 0
    start = two_processes.trainer(None, None, name="running")._meta.shared
    moved = [name for name in start if "running_" in name and not torch.equal(start[name], ours.shared[name])]
    assert len(moved) == 4  # a mean and a variance of two layers


def test_runs_are_resumed_with_another_number_of_processes(together, tmp_path):
    found, folder = together
    whole = two_processes.train(tmp_path / "whole", None, "ibaml")
    for one in found:
        assert difference(one["resumed"][1], whole.last_meta) < 1e-10 and one["resumed"][2] == 6
        assert one["begun"][2] == 3
    assert_same_checkpoints(tmp_path / "whole", folder / "own_0" / "begun_by_one", 1e-10)
    finished = two_processes.train(folder / "own_0" / "begun_by_two", None, "ibaml")
    assert difference(finished.last_meta, whole.last_meta) < 1e-10
    assert_same_checkpoints(tmp_path / "whole", folder / "own_0" / "begun_by_two", 1e-10)


def test_the_first_process_alone_writes(together):
    _, folder = together
    assert sorted(path.name for path in folder.iterdir()) == ["blocked", "found_0.pt", "found_1.pt", "own_0"]


def test_a_step_takes_one_collective_operation(together):
    for found in together[0]:
        assert found["collectives"] == [["all_reduce"]] * 6


def test_all_processes_stop_after_the_same_step(together, tmp_path):
    found, folder = together
    for one in found:
        assert one["interrupted"] == ("interrupted", 3)  # a signal to the second process during step 3
        assert one["late"] == ("time limit", 1)  # the second process alone had a limit
    resumed = two_processes.train(folder / "own_0" / "interrupted", None, "ibaml")
    assert difference(resumed.last_meta, two_processes.train(None, None, "ibaml").last_meta) < 1e-10


def test_divergence_stops_all_processes_with_the_state_saved(together):
    found, folder = together
    assert found[0]["diverged"][:2] == found[1]["diverged"][:2]
    name, message, _ = found[0]["diverged"]
    # Task 1 is of the first process, and both know it.
    assert name == "TrainingDivergedError" and "step 4: the hypergradient is not finite" in message
    assert "tasks [1] of the step" in message
    assert [one["diverged"][2] for one in found] == [False, True]
    assert load_tensors(folder / "own_0" / "diverged" / CHECKPOINT)[1]["step"] == 3


def test_bad_data_of_one_process_is_named_by_all(together):
    found, folder = together
    for one, told in zip(found, (False, True), strict=True):
        name, message, is_told = one["per_task_diverged"]
        assert name == "ValueError" and is_told == told
        assert "training task 3 of step 3" in message and "support.x" in message
    assert load_tensors(folder / "own_0" / "per_task_diverged" / CHECKPOINT)[1]["step"] == 2


def test_evaluation_is_that_of_one_process(together):
    meta = two_processes.trainer(None, None, name="ibaml")._meta
    expected = evaluate(two_processes.fitted(meta), two_processes.Tasks(), num_tasks=7, seed=3).per_task
    for found in together[0]:
        assert found["evaluation"].keys() == expected.keys()
        assert all(difference(found["evaluation"][name], value) < 1e-10 for name, value in expected.items())


def test_a_learner_is_that_of_one_process(together):
    alone = two_processes.learner_meta(None)
    for found in together[0]:
        assert difference(found["learner"], alone) < 1e-6  # its noise variance is float32


def test_processes_that_start_differently_are_refused(together):
    for found in together[0]:
        for name in ("unequal", "unequal_weights"):
            kind, message, _ = found[name]
            assert kind == "ValueError"
            assert message.startswith("processes 0 and 1 start from different weights or settings: build the network")


def test_more_processes_than_tasks_are_refused(together):
    for found in together[0]:
        assert found["too_many"][0] == "ValueError"
        assert found["too_many"][1].startswith("tasks_per_step is 1, fewer than the 2 processes, which would leave")


# A process that dies


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_stops_the_others_and_the_checkpoint_resumes(tmp_path, victim):
    process = start(sys.executable, SCRIPT, "launch", tmp_path)
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 300  # a loaded machine starts two processes slowly
        while len(pids) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            files = [tmp_path / f"pid_{rank}" for rank in range(2)]
            pids = [int(text) for file in files if file.exists() and (text := file.read_text())]
        assert len(pids) == 2, finish(process, 1)
        killed_at = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        output = finish(process, 60)
    finally:
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - killed_at < 30
    assert process.returncode == 3, output
    assert f"process {victim} of 2 (id {pids[victim]}) was killed by SIGKILL; the others were stopped." in output
    assert gone(pids)

    told = (tmp_path / f"told_{1 - victim}").read_text()
    checkpoint = tmp_path / "run" / CHECKPOINT
    assert f"process {1 - victim} of 2 cannot reach the others: one has died or hangs" in told
    assert f"The last checkpoint is {checkpoint}: the same command resumes from it, with any number" in told

    saved = load_tensors(checkpoint)[1]["step"]
    assert saved >= 2
    changes = dict(checkpoint_every=2, validate_every=10**6, num_steps=saved + 5)
    resumed, whole = (
        two_processes.trainer(folder, None, name="ibaml", **changes).fit(two_processes.Tasks())
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert resumed.num_steps == whole.num_steps == saved + 5
    assert difference(resumed.last_meta, whole.last_meta) < 1e-6
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole", 1e-6)


@pytest.mark.parametrize(
    ("folder", "begun", "message"),
    [
        (False, False, "The state is lost, because there is no run folder to save it in."),
        (True, False, "There is no checkpoint in .* yet: the same command starts anew."),
        (True, True, "The last checkpoint is .*: the same command resumes from it, with any number of processes."),
    ],
)
def test_a_loss_says_what_can_be_resumed(tmp_path, monkeypatch, folder, begun, message):
    folder = tmp_path if folder else None
    if begun:
        two_processes.train(tmp_path, None, num_steps=1)
    survivor = two_processes.trainer(folder, None)

    def lose(*_):
        raise ProcessLostError("process 1 of 2 cannot reach the others.")

    monkeypatch.setattr(survivor, "_train_step", lose)
    with pytest.raises(ProcessLostError, match=f"cannot reach the others. {message}"):
        survivor.fit(two_processes.Tasks())


def test_a_survivor_saves_the_state_before_the_step(tmp_path, monkeypatch):
    """The first process loses nothing when another one dies: its checkpoint is of the last step that all finished."""
    whole = two_processes.train(tmp_path / "whole", None, checkpoint_every=100, validate_every=100)
    survivor = two_processes.trainer(
        tmp_path / "run", Processes(size=2), checkpoint_every=100, validate_every=100, num_steps=6
    )
    calls: list[int] = []

    def all_reduce(vector):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("Connection closed by peer\nand a long trace")

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own, own])
    )
    monkeypatch.setattr(Processes, "share", lambda self, count: range(count))  # as if the other's part were zero
    with pytest.raises(ProcessLostError, match=r"one has died or hangs \(Connection closed by peer\)\. The last check"):
        survivor.fit(two_processes.Tasks())
    assert load_tensors(tmp_path / "run" / CHECKPOINT)[1]["step"] == 3
    resumed = two_processes.train(tmp_path / "run", None, checkpoint_every=100, validate_every=100)
    assert difference(resumed.last_meta, whole.last_meta) < 1e-10


def test_rows_are_placed_among_zeros():
    rows = torch.randn(2, 3)
    total = sum(placed(rows[index : index + 1], range(index, index + 1), 2) for index in range(2))
    assert torch.equal(total, rows)


# The command line

RECIPE = "sinusoid_5shot_ibaml"
SMALL = (
    *("--trainer.tasks-per-step", "3"),
    *("--trainer.validate-every", "4"),
    *("--trainer.num-validation-tasks", "3"),
    *("--trainer.checkpoint-every", "1"),
    *("--trainer.log-every", "1"),
    *("--data.num-test-queries", "6"),
    *("--network.arguments.hidden-sizes", "6", "6"),
)


def command(folder: Path, *arguments: object) -> list[object]:
    options = ["--run-folder", folder, "--device", "cpu", "--threads", 1]
    return ["-m", "ibaml.cli", "train", RECIPE, *options, *arguments, *SMALL]


@pytest.mark.slow
def test_devices_start_processes(tmp_path):
    """A float32 recipe by the command line: interrupted, resumed, and compared with one process."""
    process = start(sys.executable, *command(tmp_path / "two", "--devices", 2, "--steps", 100_000))
    try:
        deadline = time.monotonic() + 300  # a loaded machine starts two processes slowly
        while not (tmp_path / "two" / METRICS).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    finally:
        output = finish(process, 60)
    assert process.returncode == 130, output
    stopped = int(re.search(r"Training interrupted at step (\d+);", output)[1])
    assert output.count("Training interrupted") == output.count("2 processes on cpu: 100,000 meta-steps of 3") == 1
    assert load_tensors(tmp_path / "two" / CHECKPOINT)[1]["step"] == stopped

    steps = ("--steps", stopped + 4)
    process = start(*TORCHRUN, 2, *command(tmp_path / "two", *steps))
    output = finish(process)
    assert process.returncode == 0, output
    assert f"Resuming at step {stopped} of {stopped + 4}." in output
    assert output.count(f"Training completed at step {stopped + 4};") == 1
    assert (tmp_path / "two" / "training.png").is_file()

    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command(tmp_path / "one", *steps)[2:]])
    assert caught.value.code == 0
    one, two = (load_tensors(tmp_path / name / CHECKPOINT)[0] for name in ("one", "two"))
    # float32: relative to the size of a tensor, as log-variances near -8.5 have a spacing of 1e-6.
    for name in one:
        if name.startswith(("prior", "shared")):
            assert difference(one[name], two[name]) < 1e-5 * max(1.0, float(one[name].abs().max())), name


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_prints_an_error_of_all(monkeypatch, capsys, rank):
    def refuse():
        raise ValueError("tasks_per_step is 1")

    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own, own])
    )
    monkeypatch.setattr(cli, "_run", lambda _: Processes(rank=rank, size=2).together(refuse))
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("error: tasks_per_step is 1\n" if rank == 0 else "")


@pytest.mark.slow
def test_errors_of_several_processes_are_told_once(tmp_path):
    process = start(sys.executable, *command(tmp_path, "--devices", 2, "--steps", 2, "--data", tmp_path),
                    "--trainer.tasks-per-step", "1")  # fmt: skip
    output = finish(process)
    assert process.returncode == 2, output
    assert output.count("tasks_per_step is 1, fewer than the 2 processes") == 1 and "Traceback" not in output
    assert "error: tasks_per_step is 1" in output


def test_a_launch_that_lost_a_process_says_how_to_resume(monkeypatch, capsys, tmp_path):
    def lose(arguments, count):
        assert list(arguments)[:4] == ["-m", "ibaml.cli", "train", RECIPE] and count == 3
        raise ProcessLostError("process 1 of 3 (id 77) was killed by SIGKILL; the others were stopped.")

    monkeypatch.setattr(cli, "launch", lose)
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command(tmp_path, "--devices", 3)[2:]])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "error: process 1 of 3 (id 77) was killed by SIGKILL; the others were stopped. Resume from the last" in told
    assert f"ibaml train {RECIPE} --run-folder {tmp_path} --devices N" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", 0), "devices must be at least 1, but is 0."),
        (("--devices", 2, "--threads", 0), "--threads must be at least 1, but is 0."),
    ],
)
def test_wrong_numbers_are_refused_before_any_process_starts(capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command(tmp_path, *arguments)[2:]])
    assert caught.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_devices_that_contradict_torchrun_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command(tmp_path, "--devices", 3)[2:]])
    told = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 2
    assert "--devices is 3, but torchrun has started 4 processes: leave it out." in told
