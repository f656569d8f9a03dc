"""The pickle reader and its makers: for plain data they equal Python's unpickler; everything else is refused."""

import argparse
import io
import pickle
import struct
import tracemalloc
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from eco_m2f.checkpoint.plain_pickle import Budget, PlainUnpickler, RefusedName
from eco_m2f.checkpoint.plain_values import NAMES, NUMBERS


def load(data: bytes, persistent_load=None) -> object:
    return PlainUnpickler(io.BytesIO(data), Budget(len(data)), NAMES, persistent_load).load()


PLAIN = {
    "scalars": [
        None,
        True,
        False,
        0,
        -1,
        255,
        2**31,
        -(2**40),
        2**127,
        1.5,
        float("inf"),
        "a",
        "ü" * 300,
        b"",
        b"\xff",
    ],
    "containers": {"a": [1, (2, (3,), ()), {4: {5}}], b"k": frozenset("xyz"), 1.5: {}, None: [[]]},
    "subclasses": OrderedDict(a=Counter([1, 1, 2]), b=OrderedDict()),
    "complex": [1 + 2j, bytearray(b"abc"), bytearray(), set(), frozenset()],
    "shared": [(shared := [1, 2]), shared, {"again": shared}],
    "long": list(range(3000)),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_is_read_as_python_reads_it(name, protocol):
    data = pickle.dumps(PLAIN[name], protocol=protocol)
    assert load(data) == pickle.loads(data) == PLAIN[name]


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols(protocol):
    value = {"a": [1, 2.5, None, True, False, "text", 2**70, (1, 2, 3, 4)], "b": {}}
    assert load(pickle.dumps(value, protocol=protocol)) == value


ARRAYS = {
    **{code: np.arange(6).reshape(2, 3).astype(code) for code in sorted(NUMBERS)},
    "big endian": np.arange(4, dtype=">f4"),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "turned": np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    "empty": np.zeros((0, 3), np.float32),
    "one": np.array(3, np.int8),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_numbers(name, protocol):
    array = ARRAYS[name]
    first = array.reshape(-1)[0] if array.size else np.float64(0.5)
    read, number = load(pickle.dumps([array, first], protocol=protocol))
    assert read.dtype == array.dtype.newbyteorder("=") and read.shape == array.shape
    assert np.array_equal(read, array) and number == first
    assert read.flags.writeable and torch.from_numpy(read).shape == array.shape


def test_arrays_of_python_2():
    data = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    data += b"(K\x01(K\x02tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    data += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xff\x01tb."
    assert load(data).tolist() == [255, 1]


def test_tensors_of_a_checkpoint_without_their_storage_are_refused():
    with pytest.raises(ValueError, match="persistent id"):
        load(b"\x80\x02K\x01Q.")


def test_options_of_a_run_come_as_a_dict():
    assert load(pickle.dumps(argparse.Namespace(lr=0.1, arch="x"))) == {"lr": 0.1, "arch": "x"}


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_config_comes_as_a_dict(protocol):
    config = CfgNode({"MODEL": {"DEPTHS": [2, 2], "NAME": "swin"}, "LR": 0.1})
    read = load(pickle.dumps(config, protocol=protocol))
    assert read == {"MODEL": {"DEPTHS": [2, 2], "NAME": "swin"}, "LR": 0.1} and type(read) is OrderedDict


CALL = b"cnumpy\ndtype\n"
DTYPE_F4 = CALL + b"(X\x02\x00\x00\x00f4\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"


def array(shape: bytes, data: bytes, dtype: bytes = DTYPE_F4) -> bytes:
    return b"\x80\x04" + RECONSTRUCT + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


DEEP = b"".join(b"h%c\x86q%c" % (i, i + 1) * 1 for i in range(26))
HOSTILE = {
    "os.system": b"\x80\x02cos\nsystem\n.",
    "names with dots": b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.",
    "a name that is no string": b"\x80\x04K\x01K\x02\x93.",
    "an object": b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a large extension": b"\x80\x02\x84\x01\x00\x00\x00.",
    "a persistent id as text": b"\x80\x00Pabc\n.",
    "new with keywords": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "a buffer from outside": b"\x80\x05\x97.",
    "an array called": b"\x80\x02cnumpy\nndarray\n(K\x01tR.",
    "an array of objects": b"\x80\x02" + CALL + b"(X\x02\x00\x00\x00O8tR.",
    "a record": b"\x80\x02" + CALL + b"(X\x05\x00\x00\x00f4,i4tR.",
    "a text of numpy": b"\x80\x02" + CALL + b"(X\x02\x00\x00\x00S8tR.",
    "a long double": b"\x80\x02" + CALL + b"(X\x03\x00\x00\x00f16tR.",
    "a dtype of a dtype": b"\x80\x02" + CALL + b"(]tR.",
    "a dtype with fields": b"\x80\x02"
    + CALL
    + b"(X\x02\x00\x00\x00f4tR(K\x03X\x01\x00\x00\x00<N(X\x01\x00\x00\x00xt}K\x08K\x04K\x00tb.",
    "an odd byte order": b"\x80\x02" + CALL + b"(X\x02\x00\x00\x00f4tR(K\x03X\x01\x00\x00\x00!NNNK\x00K\x00K\x00tb.",
    "an array longer than its data": array(b"K\x02\x85", b"C\x04abcd"),
    "an array shorter than its data": array(b"K\x01\x85", b"C\x08abcdefgh"),
    "a negative size": array(b"J\xff\xff\xff\xff\x85", b"C\x04abcd"),
    "two negative sizes": array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", b"C\x04abcd"),
    "sizes that wrap round": array(b"\x8a\x08" + struct.pack("<q", 2**62) + b"K\x04\x86", b"C\x00"),
    "a size of True": array(b"\x88\x85", b"C\x04abcd"),
    "a shape that is a number": array(b"K\x01", b"C\x04abcd"),
    "many axes": array(b"(" + b"K\x01" * 70 + b"t", b"C\x04abcd"),
    "a dtype not built": array(b"K\x01\x85", b"C\x04abcd", CALL + b"(X\x02\x00\x00\x00f4tR"),
    "an array without a state": b"\x80\x04" + RECONSTRUCT + b".",
    "an array hidden in a list before its state": b"\x80\x04]" + RECONSTRUCT + b"a.",
    "an array's own class": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(K\x01(K\x00tC\x01btR.",
    "a state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "a state of a list": b"\x80\x02]}b.",
    "a state of a dict": b"\x80\x02}}b.",
    "a function that stays": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.",
    "a list called": b"\x80\x02])R.",
    "a string called": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "arguments that are a list": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "bytearray of a size": b"\x80\x02cbuiltins\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x01tR.",
    "bytes of a size": b"\x80\x02c__builtin__\nbytes\n(\x8a\x05\x00\x00\x00\x00\x01tR.",
    "another codec": b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7tR.",
    "a tuple as key": b"\x80\x02}K\x01\x85K\x01s.",
    "a key whose hash does not end": b"\x80\x02})q\x00" + DEEP + b"\x8a\x01\x01s.",
    "a set of tuples": b"\x80\x04\x8f(K\x01\x85\x90.",
    "a list of pairs with a tuple as key": b"\x80\x02ccollections\nOrderedDict\n]K\x01\x85K\x01\x86a\x85R.",
    "a key that collides": b"\x80\x02}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"K\x01s.",
    "a dict with half a pair": b"\x80\x02}(K\x01u.",
    "a huge integer": b"\x80\x02\x8b" + struct.pack("<i", 1000) + b"\x01" * 1000 + b".",
    "an integer longer than the file": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a text longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 + 1) + b".",
    "a bytearray longer than the file": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a memo that is negative": b"\x80\x00Np-1\n.",
    "a memo that is empty": b"\x80\x02h\x05.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "lists a thousand deep": b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
    "tuples a thousand deep": b"\x80\x02N" + b"\x85" * 1000 + b".",
    "lists that double 40 times": b"\x80\x02]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 40 + b".",
    "nothing on the stack": b"\x80\x02.",
    "nothing to take": b"\x80\x02a.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02N",
    "nothing at all": b"",
    "an unknown opcode": b"\x80\x02\xff.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, monkeypatch):
    monkeypatch.setattr("eco_m2f.checkpoint.plain_pickle.MAX_OPCODES", 10_000)
    with pytest.raises((ValueError, TypeError, LookupError)):
        load(HOSTILE[name])


@pytest.mark.parametrize("name", ["os.system", "an array of objects"])
def test_what_is_refused_is_named(name):
    with pytest.raises(RefusedName, match=r"os\.system|numpy\.dtype\(O8\)"):
        load(HOSTILE[name])


def test_a_name_is_fit_for_a_message():
    assert RefusedName("a\n\x1b[2Jü" + "x" * 500).name.startswith("a\\n\\x1b[2J\\xfc")
    assert len(RefusedName("x" * 500).name) == 100


SPENDERS = {
    "a large place in the memo": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "one text encoded 2000 times": b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"a" * 65536
    + b"\x85q\x01]" + b"h\x00h\x01Ra" * 2000 + b".",
    "one list made a set 2000 times": b"\x80\x04cbuiltins\nset\nq\x00](" + b"K\x01" * 20000
    + b"e\x85q\x01]" + b"h\x00h\x01Ra" * 2000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", SPENDERS)
def test_memory_is_bounded_by_the_size_of_the_file(name):
    data = SPENDERS[name]
    tracemalloc.start()
    try:
        load(data)
    except ValueError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * len(data) + 2**21, peak


def test_the_number_of_opcodes_is_bounded(monkeypatch):
    monkeypatch.setattr("eco_m2f.checkpoint.plain_pickle.MAX_OPCODES", 100)
    assert load(b"(" * 50 + b"1" * 48 + b"0N.") is None
    with pytest.raises(ValueError, match="more than 100 pickle opcodes"):
        load(b"\x8f" * 101 + b".")
