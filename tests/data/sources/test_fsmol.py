import numpy as np
import pytest
import torch

from ibaml.data import AssayTasks, hold_out, load_assays
from ibaml.data.sources.fsmol import FILE_NAME, stratified_split


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(**changes):
    """Three assays over six molecules; molecule i has count i + 1 at entry 10 i and count 1 at entry 2047."""
    found = {
        "task_name": np.array(["A1", "A2", "A3"]),
        "task_split": np.array(["train", "valid", "train"]),
        # Not sorted by assay, as a file of another origin may be.
        "row_task": np.array([0, 1, 0, 1, 2, 0, 0, 2, 2, 2, 2], dtype=np.int16),
        "row_mol": np.array([0, 1, 2, 3, 4, 5, 1, 0, 1, 2, 3], dtype=np.int32),
        "label": np.array([0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0], dtype=np.uint8),
        "fp_ptr": np.arange(0, 14, 2, dtype=np.int64),
        "fp_index": np.array([[10 * i, 2047] for i in range(6)], dtype=np.uint16).ravel(),
        "fp_count": np.array([[i + 1, 1] for i in range(6)], dtype=np.uint8).ravel(),
    }
    return {**found, **changes}


@pytest.fixture
def write(tmp_path):
    def save(**changes):
        values = arrays(**changes)
        np.savez(tmp_path / FILE_NAME, **{name: value for name, value in values.items() if value is not None})
        return tmp_path

    return save


def test_assays_and_fingerprints_are_those_of_the_file(write):
    assays = load_assays("train", root=write())
    assert assays.names == ("A1", "A3") and len(assays) == 2
    assert assays.rows[0].tolist() == [0, 2, 5, 1] and assays.labels[0].tolist() == [0, 1, 0, 1]
    assert assays.rows[1].tolist() == [4, 0, 1, 2, 3] and assays.labels[1].tolist() == [1, 0, 0, 1, 0]
    counts = assays.fingerprints(np.array([4, 0, 4]), "counts")
    expected = torch.zeros(3, 2048)
    expected[0, 40] = expected[2, 40] = 5
    expected[1, 0] = 1
    expected[:, 2047] = 1
    assert torch.equal(counts, expected)
    assert torch.equal(assays.fingerprints(np.array([4]), "binary"), (expected[:1] > 0).float())
    assert torch.equal(assays.fingerprints(np.array([4])), expected[:1].log1p())
    assert load_assays("valid", path=write() / FILE_NAME).names == ("A2",)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label": None}, "it lacks label"),
        ({"label": np.full(11, 2, dtype=np.uint8)}, "label has values other than 0 and 1"),
        ({"label": np.zeros(10, dtype=np.uint8)}, "row_task, row_mol and label differ in length"),
        ({"task_split": np.array(["train"])}, "task_split and task_name differ in length"),
        ({"row_task": np.full(11, 3)}, "row_task has indices out of range"),
        ({"row_mol": np.full(11, 6)}, "row_mol has indices out of range"),
        ({"fp_count": np.ones(3, dtype=np.uint8)}, "fp_count and fp_index differ in length"),
        ({"fp_index": np.full(12, 2048, dtype=np.uint16)}, "fp_index has entries of 2048 or more"),
        ({"fp_ptr": np.array([0, 4, 2, 6, 8, 10, 12])}, "fp_ptr does not rise from 0"),
        ({"label": np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0])}, "assay A1 has 4 rows of a single class"),
        ({"task_name": np.array(["A1", "A2", None], dtype=object)}, "cannot be read as an assay file: Object arrays"),
        (
            {"fp_count": np.full(12, np.nan)},
            "fp_count has shape .* dtype float64, but expected a vector of whole",
        ),
        ({"fp_count": np.full(12, -1)}, "fp_count has negative counts"),
        ({"label": np.zeros((11, 1), np.uint8)}, r"label has shape \(11, 1\) and dtype uint8, but expected a vector"),
        ({"task_name": np.arange(3)}, "task_name has shape .* dtype int64, but expected a vector of text"),
    ],
)
def test_damaged_files_are_refused(write, changes, problem):
    with pytest.raises(ValueError, match=problem):
        load_assays("train", root=write(**changes))


def test_a_changed_byte_is_noticed(write):
    """Bytes here and there, changed in their lowest and in their highest bit: refused, or nothing differs."""
    path = write() / FILE_NAME
    whole = path.read_bytes()
    expected = load_assays("train", path=path)
    for place in range(0, len(whole), 29):
        for flip in (1, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                found = load_assays("train", path=path)
            except ValueError as error:
                assert FILE_NAME in str(error)
                continue
            assert found.names == expected.names
            np.testing.assert_array_equal(np.concatenate(found.rows), np.concatenate(expected.rows))
            np.testing.assert_array_equal(found.counts, expected.counts)


def test_missing_files_and_splits_are_named(write, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no assays of split 'test'; it has train, valid"):
        load_assays("test", root=write())
    with pytest.raises(FileNotFoundError, match=r"other.npz not found; path must name a .npz file"):
        load_assays("train", path=tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.npz cannot be read as an assay file"):
        load_assays("train", path=tmp_path / "text.npz")
    monkeypatch.delenv("IBAML_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="fsmol_train_valid.npz not found; looked in .*FS-Mol"):
        load_assays("train", root=tmp_path / "nowhere")


@pytest.mark.parametrize("num_active", [1, 5, 20, 39])
@pytest.mark.parametrize("num_support", [2, 16, 39])
def test_support_sets_are_stratified_and_disjoint_from_the_rest(num_active, num_support):
    labels = np.array([1] * num_active + [0] * (40 - num_active))
    support, rest = stratified_split(labels, num_support, generator=generator())
    assert sorted([*support, *rest]) == list(range(40)) and len(support) == num_support
    active = labels[support].sum()
    assert 1 <= active <= num_support - 1
    assert abs(active - num_support * num_active / 40) <= 1


def test_every_row_is_as_likely_as_another_of_its_class_to_be_known():
    labels = np.array([1] * 4 + [0] * 4)
    one = generator()
    known = np.zeros(8)
    for _ in range(2000):
        known[stratified_split(labels, 4, generator=one)[0]] += 1
    assert np.abs(known / 2000 - 0.5).max() < 5 * np.sqrt(0.25 / 2000)


def many(write, sizes):
    rows = [(task, row % 6, row % 2) for task, size in enumerate(sizes) for row in range(size)]
    task, molecule, label = (np.array(column) for column in zip(*rows, strict=True))
    names = np.array([f"A{index:03}" for index in range(len(sizes))])
    split = np.array(["train"] * len(sizes))
    return load_assays(
        "train",
        root=write(task_name=names, task_split=split, row_task=task, row_mol=molecule, label=label),
    )


def test_a_draw_has_one_support_size_and_query_sets_of_the_smallest(write):
    assays = many(write, [12, 20, 30])
    tasks = AssayTasks(assays, support_sizes=(4, 8), num_queries=10, min_queries=2)
    assert tasks.input_shape == (2048,) and tasks.num_outputs == 2
    one = generator()
    shapes = set()
    for _ in range(60):
        episode = tasks.sample(3, generator=one)
        assert episode.support.x.shape[0] == 3 and episode.support.y.dtype == torch.int64
        assert torch.equal(episode.support.y.sum(1) * 2, torch.full((3,), episode.support.y.shape[1]))
        shapes.add((episode.support.y.shape[1], episode.query.y.shape[1]))
    # Twelve rows leave four or eight; the others have enough for ten.
    assert shapes == {(4, 8), (4, 10), (8, 4), (8, 10)}
    assert not tasks.has_equal_sizes
    whole = tasks.episode(2, 4, generator=one)
    assert whole.query.y.shape == (26,)
    again = [tasks.sample(2, generator=generator(7)) for _ in range(2)]
    assert torch.equal(again[0].query.x, again[1].query.x)


def test_equal_query_sets_are_the_default(write):
    tasks = AssayTasks(many(write, [12, 20, 30]), support_sizes=(4,), num_queries=16)
    assert tasks.has_equal_sizes
    one = generator()
    assert {tasks.sample(1, generator=one).query.y.shape for _ in range(20)} == {(1, 16)}


def test_arguments_out_of_range_are_refused(write):
    assays = many(write, [12])
    with pytest.raises(ValueError, match="support_sizes is empty"):
        AssayTasks(assays, support_sizes=(), num_queries=4)
    with pytest.raises(ValueError, match="support_sizes must be at least 2"):
        AssayTasks(assays, support_sizes=(1,), num_queries=4)
    with pytest.raises(ValueError, match=r"min_queries must be at most num_queries \(4\), got 5"):
        AssayTasks(assays, support_sizes=(4,), num_queries=4, min_queries=5)
    with pytest.raises(ValueError, match="fingerprints must be 'log_counts', 'counts' or 'binary', got 'bits'"):
        AssayTasks(assays, support_sizes=(4,), num_queries=4, fingerprints="bits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no assay has the 20 rows that this and 12 queries take; the largest has 12"):
        AssayTasks(assays, support_sizes=(8,), num_queries=12)
    tasks = AssayTasks(assays, support_sizes=(4,), num_queries=4)
    with pytest.raises(ValueError, match="assay A000 has 12 rows, fewer than the 13 asked for"):
        tasks.episode(0, 4, 9, generator=generator())


def test_large_assays_are_held_out_every_so_often(write):
    assays = many(write, [12, 20, 30, 9, 20, 20])
    learn, held_out = hold_out(assays, every=2, min_rows=20)
    assert held_out.names == ("A001", "A004") and learn.names == ("A000", "A002", "A003", "A005")
    with pytest.raises(ValueError, match="6 assays, 0 of them with at least min_rows=128 rows, leave none to hold out"):
        hold_out(assays)
