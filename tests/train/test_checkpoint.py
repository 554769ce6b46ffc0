"""Files that come back bit for bit, or are refused: never half a file, never a silent change."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import Categorical, Gaussian
from ibaml.networks import MLP
from ibaml.priors import DiagonalGaussian
from ibaml.train import checkpoint
from ibaml.train.checkpoint import digest, load_tensors, meta_from_tensors, meta_to_tensors, save_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def small(path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.tensor([1.5, -0.0, float("nan")]), "b/c": torch.arange(3)}
    save_tensors(path, tensors, {"step": 5, "name": "é"})
    return tensors


def meta(kind: str = "ibaml", hidden: int = 4):
    network = MLP(2, input_shape=3, hidden_sizes=(hidden,), generator=torch.Generator().manual_seed(0))
    algorithm = make_algorithm(kind)
    model = build_model(network, Gaussian(num_targets=2), adapt="head.*")
    return algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)])
def test_every_dtype_and_shape_comes_back(tmp_path, dtype, shape):
    source = torch.Generator().manual_seed(0)
    value = torch.randint(-100, 100, shape, generator=source).to(dtype)
    save_tensors(tmp_path / "file", {"x": value}, {})
    tensors, metadata = load_tensors(tmp_path / "file")
    assert metadata == {} and tensors.keys() == {"x"}
    assert tensors["x"].dtype == dtype and tensors["x"].shape == shape
    assert torch.equal(tensors["x"], value)


def test_special_values_keep_their_bits(tmp_path):
    value = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    save_tensors(tmp_path / "file", {"x": value}, {})
    assert torch.equal(load_tensors(tmp_path / "file")[0]["x"].view(torch.int32), value.view(torch.int32))


def test_no_tensors_at_all(tmp_path):
    save_tensors(tmp_path / "file", {}, {"a": [1, None, "x", {"b": 0.1}]})
    assert load_tensors(tmp_path / "file") == ({}, {"a": [1, None, "x", {"b": 0.1}]})


def test_views_shared_storage_and_gradients(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"all": base, "transposed": base.T, "column": base[:, 1], "grad": torch.ones(2, requires_grad=True)}
    tensors["expanded"] = torch.ones(1).expand(4)
    save_tensors(tmp_path / "file", tensors, {})
    loaded = load_tensors(tmp_path / "file")[0]
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value) and not loaded[name].requires_grad


@given(
    st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"), st.integers(0, 3)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_names_and_json(tmp_path_factory, sizes, value):
    path = tmp_path_factory.mktemp("any") / "file"
    tensors = {name: torch.arange(size) for name, size in sizes.items()}
    try:
        "".join(sizes).encode()
    except UnicodeEncodeError:
        return
    save_tensors(path, tensors, {"value": value})
    loaded, metadata = load_tensors(path)
    assert metadata == {"value": value}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_replaces_an_older_file(tmp_path):
    small(tmp_path / "file")
    save_tensors(tmp_path / "file", {"z": torch.ones(1)}, {})
    assert load_tensors(tmp_path / "file")[0].keys() == {"z"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["writing", "moving", "interrupted"])
def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, where):
    tensors = small(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def half(_, path, **__):
        path.write_bytes(b"half a file")
        if where == "interrupted":
            raise KeyboardInterrupt
        raise checkpoint.SafetensorError("no space left on device")

    def refuse(*_):
        raise OSError("cross-device link")

    if where == "moving":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setattr(checkpoint, "save_file", half)
    error, message = {
        "writing": (OSError, "cannot write .*file: no space left on device"),
        "moving": (OSError, "cross-device link"),
        "interrupted": (KeyboardInterrupt, None),
    }[where]
    with pytest.raises(error, match=message):
        save_tensors(tmp_path / "file", {"z": torch.ones(5)}, {})
    assert (tmp_path / "file").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    assert torch.equal(load_tensors(tmp_path / "file")[0]["b/c"], tensors["b/c"])


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="cannot write .*absent/file|No such file"):
        small(tmp_path / "absent" / "file")


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"there is no checkpoint at {path}.")):
            load_tensors(path)


def test_every_truncation_is_refused(tmp_path):
    small(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    for length in range(len(content)):
        (tmp_path / "file").write_bytes(content[:length])
        with pytest.raises(ValueError, match="file is no readable checkpoint .*: it is truncated or not a safetensors"):
            load_tensors(tmp_path / "file")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
def test_every_changed_byte_is_refused(tmp_path, flip):
    small(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    padding = set(
        range(content.index(b"}", content.rindex(b"data_offsets")), 8 + int.from_bytes(content[:8], "little"))
    )
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= flip
        (tmp_path / "file").write_bytes(changed)
        try:
            tensors, metadata = load_tensors(tmp_path / "file")
        except ValueError as error:
            assert re.search("no readable checkpoint|has format|is damaged", str(error))
            continue
        # Nothing but the blanks that fill up the header may change without a trace.
        assert place in padding
        assert metadata == {"step": 5, "name": "é"} and torch.equal(tensors["b/c"], torch.arange(3))


def test_appended_bytes_are_refused(tmp_path):
    small(tmp_path / "file")
    with (tmp_path / "file").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_tensors(tmp_path / "file")


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"format": "ibaml-99", "sha256": "", "json": "{}"}])
def test_foreign_and_newer_files_are_refused(tmp_path, header):
    save_file({"x": torch.ones(2)}, tmp_path / "file", metadata=header)
    name = repr((header or {}).get("format"))
    message = f"has format {name}, but this version reads 'ibaml-1': it was written by another program or a newer"
    with pytest.raises(ValueError, match=message):
        load_tensors(tmp_path / "file")


def test_a_pickle_is_not_executed(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_tensors(tmp_path / "file")


def test_digest_depends_on_all_that_counts():
    reference = digest({"a": torch.zeros(4)}, "text")
    assert reference == digest({"a": torch.zeros(4)}, "text")
    others = [
        digest({"b": torch.zeros(4)}, "text"),
        digest({"a": torch.zeros(2, 2)}, "text"),
        digest({"a": torch.zeros(4, dtype=torch.int32)}, "text"),
        digest({"a": torch.tensor([0.0, 0.0, 0.0, -0.0])}, "text"),
        digest({"a": torch.zeros(4)}, "test"),
        digest({}, "text"),
    ]
    assert len({reference, *others}) == 7
    assert digest({"a": torch.ones(2, 3).T}) == digest({"a": torch.ones(3, 2)})


@pytest.mark.parametrize("kind", ["ibaml", "maml"])
def test_meta_parameters_come_back(tmp_path, kind):
    original = meta(kind)
    save_tensors(tmp_path / "file", meta_to_tensors(original) | {"optimizer/0/step": torch.ones(())}, {})
    like = tree.map(torch.zeros_like, original)
    loaded = meta_from_tensors(load_tensors(tmp_path / "file")[0], like=like, source="file")
    assert isinstance(loaded.prior, DiagonalGaussian) == (kind == "ibaml")
    assert loaded.shared.keys() == {"features.0.weight", "features.0.bias", "likelihood.log_noise_variance"}
    for one, other in zip(tree.leaves(loaded), tree.leaves(original), strict=True):
        assert torch.equal(one, other)


def test_meta_parameters_take_the_dtype_of_the_model():
    original = meta()
    double = meta_from_tensors(meta_to_tensors(original), like=tree.map(torch.Tensor.double, original), source="file")
    assert all(leaf.dtype == torch.float64 for leaf in tree.leaves(double))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            meta("maml"),
            r"prior/head\.bias is missing.*prior/log_var/head\.bias is not in the model",
        ),
        (meta(hidden=5), r"prior/log_var/head\.weight has shape \(2, 4\), the model \(2, 5\)"),
        (
            meta()._replace(shared={"likelihood.log_noise_variance": torch.zeros(2)}),
            r"shared/features\.0\.bias is not in the model",
        ),
    ],
)
def test_meta_parameters_of_another_model_are_refused(like, message):
    with pytest.raises(ValueError, match="some file belongs to another network or algorithm: .*" + message) as caught:
        meta_from_tensors(meta_to_tensors(meta()), like=like, source="some file")
    assert "Build the model with the settings that it was trained with." in str(caught.value)


def test_a_long_list_of_differences_is_cut():
    def of(prefix: str):
        values = {f"{prefix}{index}": torch.zeros(1) for index in range(6)}
        return MetaParameters(values, {})

    with pytest.raises(ValueError, match=r"(; .*){4}; and more\. Build") as caught:
        meta_from_tensors(meta_to_tensors(of("a")), like=of("b"), source="file")
    assert str(caught.value).count("prior/") == 5


def test_categorical_models_have_no_likelihood_parameters():
    model = build_model(MLP(2, input_shape=3), Categorical())
    assert not any(name.startswith("likelihood.") for name in model.shared)
