import io
import os
import pickle
import pickletools
import re

import numpy as np
import pytest

from ibaml.data import load_arrays

CONTENT = {
    "image_data": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "class_dict": {"n01532829": [0, 1], "n01558993": [2]},
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "big-endian": np.arange(3, dtype=">i4"),
    "half": np.array([1.5, -2.0], dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "bool": np.array([True, False]),
    "no axis": np.array(3.5),
    "empty": np.zeros((0, 4)),
    "scalars": [np.int64(4), np.float32(2.5), np.bool_(True), np.uint8(255)],
    "plain": [1, -(2**100), 0.5, None, True, "text", "snow ☃", b"bytes \x00\xff", b"", (), (1, (2,))],
    3: "integer key",
}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file."""

    def write_bytes(content):
        path = tmp_path / "data.pickle"
        path.write_bytes(content)
        return path

    return write_bytes


def assert_same(got, expected):
    """Equal in value, kind, memory order and dtype; its byte order NumPy makes native in some protocols."""
    if isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray) and got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        assert got.flags.f_contiguous == expected.flags.f_contiguous
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, dict):
        assert type(got) is dict and list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(got) is type(expected) and len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(got) is type(expected) and got == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("optimize", [False, True])
def test_round_trip(write, protocol, optimize):
    content = pickle.dumps(CONTENT, protocol=protocol)
    assert_same(load_arrays(write(pickletools.optimize(content) if optimize else content)), CONTENT)


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_names_of_both_numpy_generations(write, package):
    content = pickle.dumps(CONTENT, protocol=2)
    own = b"numpy._core" if b"numpy._core" in content else b"numpy.core"
    assert_same(load_arrays(write(content.replace(own, package))), CONTENT)


# {"data": array([[0, 127], [128, 255]], dtype=uint8), "labels": [0, 1L]} as Python 2 writes it, where what is a byte
# string here (U, S) was a str.
PYTHON2 = {
    2: b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
    b"U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02K\x02\x86q\tcnumpy\ndtype\nq\nU\x02u1q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03"
    b"U\x01|q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x04\x00\x7f\x80\xffq\x10tq\x11bU\x06labelsq\x12"
    b"]q\x13(K\x00\x8a\x01\x01eu.",
    0: b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\ntp5\nS'b'\np6\ntp7\n"
    b"Rp8\n(I1\n(I2\nI2\ntp9\ncnumpy\ndtype\np10\n(S'u1'\np11\nI0\nI1\ntp12\nRp13\n(I3\nS'|'\np14\nNNNI-1\nI-1\nI0\n"
    b"tp15\nbI00\nS'\\x00\\x7f\\x80\\xff'\np16\ntp17\nbsS'labels'\np18\n(lp19\nI0\naL1L\nas.",
}


@pytest.mark.parametrize("protocol", [0, 2])
def test_python2(write, protocol):
    expected = {"data": np.array([[0, 127], [128, 255]], dtype=np.uint8), "labels": [0, 1]}
    assert_same(load_arrays(write(PYTHON2[protocol])), expected)


def test_expands_tilde(write, monkeypatch):
    path = write(pickle.dumps([1]))
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    assert load_arrays("~/data.pickle") == [1]


class Caller:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(string):
    """The operation that puts a string on the stack."""
    return b"X" + len(string.encode()).to_bytes(4, "little") + string.encode()


def attacks(marker):
    """Pickles that create a file when read by ``pickle.load``, by name."""
    shell = f'echo > "{marker}"'
    python = f"open({str(marker)!r}, 'w').close()"
    call = b"cos\nsystem\n" + text(shell) + b"\x85R0"
    harmful = np.empty(1, dtype=object)
    harmful[0] = Caller(os.system, shell)
    stream = io.BytesIO()
    np.save(stream, harmful, allow_pickle=True)
    stream.seek(0)
    return {
        **{f"os.system {protocol}": pickle.dumps(Caller(os.system, shell), protocol) for protocol in PROTOCOLS},
        "eval": pickle.dumps(Caller(eval, python)),
        "getattr": pickle.dumps(Caller(getattr, Caller(eval, f"[{python}]"), "append")),
        "eval of Python 2": b"c__builtin__\neval\n(" + text(python) + b"tR.",
        "INST": b"(" + text(shell) + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(shell) + b"o.",
        "dotted name": b"\x80\x04" + text("posixpath") + text("os.system") + b"\x93" + text(shell) + b"\x85R.",
        "beside data": pickle.dumps({**CONTENT, "more": Caller(os.system, shell)}),
        "left on the stack": call + b"N.",
        "array of objects": pickle.dumps(harmful),
        "numpy.load": pickle.dumps(Caller(np.load, stream, None, True)),
    }


@pytest.mark.parametrize("attack", attacks("marker"))
def test_runs_no_code(write, tmp_path, attack):
    marker = tmp_path / "marker"
    content = attacks(marker)[attack]
    pickle.loads(content)
    assert marker.exists(), "the attack is none"
    marker.unlink()
    with pytest.raises(ValueError, match=r"data\.pickle is refused: it .*could run code"):
        load_arrays(write(content))
    assert not marker.exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text("b") + b"tR"
DTYPE = b"cnumpy\ndtype\n(" + text("u1") + b"I0\nI1\ntR"
STATE = b"(I1\n(I2\nt" + DTYPE + b"I0\n" + text("ab") + b"tb"


def test_pieces_make_an_array(write):
    """What the next test varies is sound."""
    assert_same(load_arrays(write(ARRAY + STATE + b".")), np.array([97, 98], dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n.", "it names os.system, and only containers, strings, numbers and numeric arrays are read"),
        (b"cnumpy\ndtype\n(" + text("O8") + b"tR.", "it has an array of dtype object, and objects in an array could"),
        (b"cnumpy\ndtype\n(" + text("i4,O") + b"tR.", "it has an array of dtype [('f0', '<i4'), ('f1', 'O')], and"),
    ],
)
def test_says_what_it_refuses(write, content, message):
    with pytest.raises(ValueError, match=re.escape(f"data.pickle is refused: {message}")):
        load_arrays(write(content))


@pytest.mark.parametrize(
    "content",
    [
        # An array larger than its bytes, with objects for bytes, and one that takes NumPy's own state.
        ARRAY + STATE.replace(b"(I2\nt", b"(I99999999\nt") + b".",
        ARRAY + STATE.replace(b"(I2\nt", b"(I-1\nI-2\nt") + b".",
        ARRAY + STATE.replace(text("ab"), b"]") + b".",
        ARRAY + STATE.replace(text("ab"), b"I99999\n") + b".",
        ARRAY + STATE.replace(DTYPE, text("O8")) + b".",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"Pname\n.",
        b"",
        b"<html>",
        pickle.dumps(CONTENT)[:-20],
    ],
)
def test_what_is_no_intact_pickle(write, content):
    with pytest.raises(
        ValueError, match=r"(?s)data.pickle is not an intact pickle \(.*: .*\): probably a copy or download"
    ):
        load_arrays(write(content))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_changes_nothing_of_the_reader(write, protocol):
    """BUILD sets attributes of what a name stands for."""
    change = b"cnumpy.core.numeric\n_frombuffer\nN}" + text("__defaults__") + b"(I1\nts\x86b."
    load_arrays(write(change))
    assert_same(load_arrays(write(pickle.dumps(CONTENT, protocol))), CONTENT)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "data.pickle")
