import collections
import copyreg
import datetime
import io
import os
import pickle
import pickletools
import random
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ibaml.data import load_arrays, restricted_pickle

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
    """Equal in value, type, dtype and memory order."""
    if isinstance(expected, np.ndarray):
        assert type(got) is np.ndarray and got.dtype == expected.dtype and not got.flags.writeable
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


def test_both_names_of_frombuffer(write):
    content = pickle.dumps(np.arange(3), protocol=5)
    names = b"\x8c\x12numpy.core.numeric", b"\x8c\x13numpy._core.numeric"
    for old, new in (names, names[::-1]):
        # Without the first eleven bytes: protocol and frame, whose length the name changes.
        changed = b"\x80\x05" + content[11:].replace(old, new)
        assert new in changed
        assert_same(load_arrays(write(changed)), np.arange(3))


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


def test_shared_objects_stay_shared(write):
    row = [1]
    got = load_arrays(write(pickle.dumps([row, row, {"row": row}])))
    assert got == [[1], [1], {"row": [1]}] and got[0] is got[1] is got[2]["row"]


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


DTYPE = b"cnumpy\ndtype\n(" + text("u1") + b"I0\nI1\ntR"
DTYPE_STATE = b"(I3\n" + text("|") + b"NNNI-1\nI-1\nI0\ntb"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text("b") + b"tR"
STATE = b"(I1\n(I2\nt" + DTYPE + b"I0\n" + text("ab") + b"tb"
ENCODE = b"c_codecs\nencode\n"
FROMBUFFER = b"cnumpy.core.numeric\n_frombuffer\n"


def running_pickles(marker):
    """Pickles that create a file when read by ``pickle.load``, by name."""
    shell = f'echo > "{marker}"'
    python = f"open({str(marker)!r}, 'w').close()"
    call = b"cos\nsystem\n" + text(shell) + b"\x85R0"
    harmful = np.empty(1, dtype=object)
    harmful[0] = Caller(os.system, shell)
    attacks = {
        "global of Python 2": b"c__builtin__\neval\n(" + text(python) + b"tR.",
        "INST": b"(" + text(shell) + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(shell) + b"o.",
        "dotted name": b"\x80\x04"
        + text("ibaml.data.files.locate")
        + text("os.system")
        + b"\x93"
        + text(shell)
        + b"\x85R.",
        "in a dict that holds data too": pickle.dumps({**CONTENT, "more": Caller(os.system, shell)}),
        "left on the stack": call + b"N.",
        "array of objects": pickle.dumps(harmful),
        "amid an array": ARRAY + STATE.replace(text("ab"), call + text("ab")) + b".",
    }
    for protocol in PROTOCOLS:
        attacks[f"os.system, protocol {protocol}"] = pickle.dumps(Caller(os.system, shell), protocol=protocol)
    attacks["eval"] = pickle.dumps(Caller(eval, python))
    attacks["exec"] = pickle.dumps(Caller(exec, python))
    attacks["getattr"] = pickle.dumps(Caller(getattr, Caller(eval, f"[{python}]"), "append"))
    attacks["numpy.load"] = pickle.dumps(Caller(np.load, io_of(harmful), None, True))
    return attacks


def io_of(array):
    """A BytesIO with a .npy file of objects."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    stream.seek(0)
    return stream


ATTACKS = list(running_pickles("marker"))


@pytest.mark.parametrize("scanned", [True, False], ids=["scan", "no scan"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_runs_no_code(write, tmp_path, monkeypatch, attack, scanned):
    marker = tmp_path / "marker"
    content = running_pickles(marker)[attack]
    pickle.loads(content)
    assert marker.exists(), "the attack is none"
    marker.unlink()
    if not scanned:  # find_class alone has to hold as well
        monkeypatch.setattr(restricted_pickle, "_check_program", lambda data: None)
    with pytest.raises(ValueError, match=r"data\.pickle is refused: it .*could run code"):
        load_arrays(write(content))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"\x80\x04" + text("numpy") + text("_core.multiarray._reconstruct") + b"\x93.", "numpy._core.multiarray._rec"),
        (b"\x80\x04" + text("numpy._core") + text("multiarray._reconstruct") + b"\x93.", "numpy._core.multiarray._rec"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy\nmemmap\n.", "numpy.memmap"),
        (b"cnumpy\nrecarray\n.", "numpy.recarray"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
        (pickle.dumps(datetime.date(2026, 1, 1)), "datetime.date"),
        (pickle.dumps(collections.OrderedDict()), "collections.OrderedDict"),
        (pickle.dumps(1j), "builtins.complex"),
        (pickle.dumps(Caller), "Caller"),
        (b"csubprocess\nPopen\n)\x81.", "subprocess.Popen"),
        (b"c" + b"x" * 500 + b"\nname\n.", "x" * 200),
    ],
)
def test_names_what_it_refuses(write, content, name):
    with pytest.raises(
        ValueError, match=f"data.pickle is refused: it names [^,]*{name}[^,]*, which data does not need"
    ):
        load_arrays(write(content))


def test_cached_extension_is_refused(write, tmp_path):
    """The unpickler takes extensions from a cache without asking find_class: only the scan stops this one."""

    class NothingAllowed(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError("no")

    marker = tmp_path / "marker"
    content = b"\x80\x02\x82\xf0" + text(f'echo > "{marker}"') + b"\x85R."
    copyreg.add_extension("os", "system", 0xF0)
    copyreg._extension_cache[0xF0] = os.system
    try:
        NothingAllowed(io.BytesIO(content)).load()
        assert marker.exists(), "the attack is none"
        marker.unlink()
        with pytest.raises(ValueError, match="data.pickle is refused: it uses the operation EXT1 at byte 2"):
            load_arrays(write(content))
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not marker.exists()


def test_pieces_make_an_array(write):
    """What the next test varies is sound."""
    expected = np.array([97, 98], dtype=np.uint8)
    assert_same(load_arrays(write(ARRAY + STATE + b".")), expected)
    content = FROMBUFFER + b"(C\x02ab" + DTYPE + DTYPE_STATE + b"(I2\nt" + text("C") + b"tR."
    assert_same(load_arrays(write(content)), expected)
    # A version number before the rest is a later addition.
    assert_same(load_arrays(write(ARRAY + b"((I2\nt" + DTYPE + b"I0\n" + text("ab") + b"tb.")), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(ENCODE + b"(" + text("this") + text("rot13") + b"tR.", "calls _codecs.encode for", id="codec"),
        pytest.param(ENCODE + b"(" + text("this") + b"tR.", "calls _codecs.encode for", id="codec left out"),
        pytest.param(ENCODE + b"(NNtR.", "calls _codecs.encode for", id="codec of None"),
        pytest.param(ENCODE + b"}" + text("a") + b"I1\nsb.", "changes _codecs.encode", id="change a function"),
        pytest.param(
            FROMBUFFER + b"N}" + text("__defaults__") + b"(I1\nts\x86b.",
            "changes numpy.core.numeric._frombuffer",
            id="change its defaults",
        ),
        pytest.param(b"cnumpy\nndarray\n}b.", "changes numpy.ndarray", id="change a class"),
        pytest.param(b"cnumpy\nndarray\n(I9\ntR.", "calls numpy.ndarray", id="uninitialised array"),
        pytest.param(b"c__builtin__\nbytes\n(I9\ntR.", "calls bytes with arguments", id="bytes"),
        pytest.param(b"cnumpy\ndtype\n)R.", "not numeric .dtype a NoneType", id="dtype of nothing"),
        pytest.param(b"cnumpy\ndtype\n(" + text("O8") + b"tR.", "not numeric .dtype 'O8'", id="dtype of objects"),
        pytest.param(b"cnumpy\ndtype\n(" + text("i4,O") + b"tR.", "not numeric", id="dtype of records"),
        pytest.param(b"cnumpy\ndtype\n(" + text("c1") + b"tR.", "not numeric", id="dtype of nonsense"),
        pytest.param(
            DTYPE + b"(I3\n" + text("|") + b"N(" + text("f") + b"t}I-1\nI-1\nI0\ntb.",
            "not a plain number",
            id="dtype with fields",
        ),
        pytest.param(DTYPE + DTYPE_STATE + DTYPE_STATE + b".", "not a plain number", id="dtype changed twice"),
        pytest.param(DTYPE + b"}b.", "not a plain number", id="dtype with attributes"),
        pytest.param(DTYPE + b"(I3\n" + text("x") + b"NNNtb.", "not a plain number", id="byte order"),
        pytest.param(DTYPE + b".", "holds a dtype", id="dtype"),
        pytest.param(ENCODE + b".", "holds a function", id="function"),
        pytest.param(ARRAY + b".", "holds an unfinished array", id="unfinished array"),
        pytest.param(b"(" + ARRAY + STATE + b"I1\nd.", "an array for a key", id="array as key"),
        pytest.param(ARRAY + STATE + STATE + b".", "array with an unknown state", id="array changed twice"),
        pytest.param(ARRAY + b"}b.", "array with an unknown state", id="array with attributes"),
        pytest.param(ARRAY + STATE.replace(DTYPE, text("O8")) + b".", "array without a dtype", id="array of objects"),
        pytest.param(ARRAY + STATE.replace(text("ab"), b"]") + b".", "an array made of a list", id="array of a list"),
        pytest.param(ARRAY + STATE.replace(b"(I2\nt", b"I2\n") + b".", "impossible shape", id="shape"),
        pytest.param(ARRAY + STATE.replace(b"(I2\nt", b"(" + b"I1\n" * 65 + b"t") + b".", "impossible sh", id="axes"),
        pytest.param(ARRAY + STATE.replace(b"(I2\nt", b"(F2\nt") + b".", "a float in its shape", id="fractional"),
        pytest.param(ARRAY.replace(b"I0\n", b"I9\n") + b".", "array of an unknown kind", id="initial shape"),
        pytest.param(ARRAY.replace(b"cnumpy\nndarray\n", ENCODE) + b".", "array of an unknown kind", id="other class"),
        pytest.param(FROMBUFFER + b")R.", "array of an unknown kind", id="frombuffer"),
        pytest.param(FROMBUFFER + b"(C\x02ab" + DTYPE + b"(I2\nt" + text("A") + b"tR.", "unknown memory", id="order"),
        pytest.param(b"cnumpy.core.multiarray\nscalar\n)R.", "scalar of an unknown kind", id="scalar"),
        pytest.param(b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"NtR.", "an array made of a None", id="no scalar"),
        pytest.param(b"Pname\n.", "uses the operation PERSID at byte 0", id="persistent id"),
        pytest.param(b"NQ.", "uses the operation BINPERSID at byte 1", id="binary persistent id"),
        pytest.param(pickle.dumps({1}), "uses the operation EMPTY_SET", id="set"),
        pytest.param(pickle.dumps(frozenset({1})), "uses the operation FROZENSET", id="frozenset"),
        pytest.param(b"\x97.", "uses the operation NEXT_BUFFER", id="outside buffer"),
        pytest.param(pickle.dumps(bytearray(2), protocol=5), "holds a bytearray", id="bytearray"),
        pytest.param(b"]q\x00h\x00a.", "a list that contains itself", id="list in itself"),
        pytest.param(b"}q\x00N(h\x00ts.", "a dict that contains itself", id="dict in itself"),
    ],
)
def test_refuses(write, content, message):
    with pytest.raises(ValueError, match=rf"data\.pickle is refused: it .*{message}"):
        load_arrays(write(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"\x8e" + (2**60).to_bytes(8, "little") + b"x.", "BINBYTES8 at byte 0 needs .* more", id="bytes"),
        pytest.param(b"\x96" + (2**60).to_bytes(8, "little") + b"x.", "BYTEARRAY8 at byte 0 needs", id="bytearray"),
        pytest.param(b"X\xff\xff\xff\xffx.", "BINUNICODE at byte 0 needs", id="text"),
        pytest.param(b"T\xff\xff\xff\xffx.", "BINSTRING at byte 0 declares a negative length", id="negative length"),
        pytest.param(b"Nr\xff\xff\xff\xff.", "it numbers an object 4294967295 at byte 1", id="memo"),
        pytest.param(b"Np" + b"9" * 15 + b"\n.", "it numbers an object 9{15} at byte 1", id="memo in decimal"),
        pytest.param(ARRAY + STATE.replace(b"(I2\nt", b"(I99999999\nI99999999\nt") + b".", "has 2 bytes", id="shape"),
        pytest.param(ARRAY + STATE.replace(b"(I2\nt", b"(I-1\nI-2\nt") + b".", "has 2 bytes", id="negative shape"),
    ],
)
def test_claims_no_memory_beyond_the_file(write, content, message):
    path = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_same_text_converted_many_times(write):
    """A text of 100 kB of which a call of 20 bytes makes 100 kB of bytes each time it is named."""
    call = b"h\x00(h\x01h\x02tR"
    prefix = ENCODE + b"q\x000" + text("x" * 100_000) + b"q\x010" + text("latin1") + b"q\x020("
    assert load_arrays(write(prefix + call + b"l.")) == [b"x" * 100_000]
    with pytest.raises(ValueError, match="converts the same text to bytes many times over"):
        load_arrays(write(prefix + call * 1000 + b"l."))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"})\x85" + b"\x85" * 300_000 + b"Ns.", id="too deep to hash"),
        pytest.param(b"})q\x000" + b"h\x00h\x00\x86q\x000" * 64 + b"h\x00Ns.", id="too long to hash"),
        pytest.param(b"}(N)I1\nI2\n)Nu.", id="SETITEMS, third key"),
        pytest.param(b"(N))Nd.", id="DICT, second key"),
        pytest.param(b"})2s.", id="key made twice"),
    ],
)
def test_tuple_as_key(write, content):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="it has a dict with a tuple for a key at byte"):
        load_arrays(write(content))
    assert time.perf_counter() - start < 20


def test_value_may_be_a_tuple(write):
    assert load_arrays(write(b"}(N)I1\n)u(I2\n)dI3\n)s0.")) == {None: (), 1: ()}


def test_deep_lists(write):
    with pytest.raises(ValueError, match=r"data.pickle is not an intact pickle \(RecursionError"):
        load_arrays(write(b"]" * 100_000 + b"a" * 99_999 + b"."))


def test_objects_in_exponentially_many_places(write):
    """Each list holds the one before twice: 2**64 places, 65 lists."""
    got = load_arrays(write(b"]q\x000" + b"](h\x00h\x00eq\x000" * 64 + b"h\x00."))
    depth = 0
    while got:
        assert got[0] is got[1]
        got, depth = got[0], depth + 1
    assert depth == 64


@pytest.mark.parametrize(
    "array",
    [
        np.array([b"ab"]),
        np.array(["ab"]),
        np.array(["2026-01-01"], dtype="datetime64[D]"),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array([None]),
    ],
    ids=lambda array: array.dtype.kind,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_are_not_numeric(write, array, protocol):
    with pytest.raises(ValueError, match=r"is refused: it has an array or scalar that is not numeric \(dtype '"):
        load_arrays(write(pickle.dumps(array, protocol=protocol)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated_anywhere(write, protocol):
    content = pickle.dumps({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [0, 1]}, protocol=protocol)
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"data\.pickle is (empty|not an intact pickle \(EOFError).*broke off"):
            load_arrays(write(content[:length]))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_damage_gives_a_value_error_if_any(write, protocol):
    content = pickle.dumps({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [0, 1]}, protocol=protocol)
    chance = random.Random(protocol)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            load_arrays(write(damaged))
        except ValueError as error:
            assert "data.pickle is" in str(error)
            num_refused += 1
    assert 150 < num_refused < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "not an intact pickle.*byte 0 is b'<'.*perhaps a web page saved under its name"),
        (b"\x80\x02\xfe.", r"byte 2 is b'\\xfe', which no pickle has there\)"),
        (b"e.", "not an intact pickle"),
        (b"a.", "the APPEND at byte 0 lacks operands"),
        (b"N(a.", "the APPEND at byte 2 lacks operands"),
        (b"(q\x00.", "the BINPUT at byte 1 has nothing to store"),
        (b"h\x05.", "not an intact pickle .KeyError: 5"),
        (b"N(1(01.", "not an intact pickle"),
        (b"\x80\x7fN.", "unsupported pickle protocol: 127"),
        (b"]]Nsb.", "not an intact pickle"),
        (b"cn\xff\nx\n.", "not an intact pickle .UnicodeDecodeError"),
    ],
)
def test_not_a_pickle(write, content, message):
    with pytest.raises(ValueError, match=message):
        load_arrays(write(content))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pickle"):
        load_arrays(tmp_path / "absent.pickle")
    with pytest.raises(OSError, match="folder"):
        (tmp_path / "folder").mkdir()
        load_arrays(tmp_path / "folder")


def test_second_layer_refuses_persistent_ids(write, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "_check_program", lambda data: None)
    with pytest.raises(ValueError, match="it refers to an object outside the file"):
        load_arrays(write(b"Pname\n."))


def test_leaves_no_trace_in_the_interpreter(write):
    modules = set(sys.modules)
    with pytest.raises(ValueError, match="it names this.s"):
        load_arrays(write(b"cthis\ns\n."))
    with pytest.raises(ValueError, match="calls _codecs.encode"):
        load_arrays(write(ENCODE + b"(" + text("x") + text("ptcp154") + b"tR."))
    assert not {"this", "encodings.ptcp154"} & (set(sys.modules) - modules)
