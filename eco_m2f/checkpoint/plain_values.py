"""The makers for the names in a weights file. They make only containers, arrays and tensors.

Arrays hold bool, int, float or complex numbers. Their shape, strides and offset are checked against the length of the
buffer before an array is made.
"""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .plain_pickle import Maker, RefusedName, Unbuilt, check_key, pairs

MAX_DIMENSIONS = 32
NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
DTYPES = {  # torch's types by the names of their storages
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
NDARRAY = object()  # stands for numpy.ndarray, which is never called


def _need(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _whole_numbers(values: Any, what: str) -> tuple[int, ...]:
    """Sizes, strides or axes. Raises ValueError unless they are a short tuple of ints >= 0."""
    good = isinstance(values, tuple | list) and len(values) <= MAX_DIMENSIONS
    _need(good and all(type(v) is int and 0 <= v < 2**62 for v in values), f"an array's {what} is no list of sizes")
    return tuple(values)


def _encoded(text: Any = "", encoding: str = "latin1") -> bytes:
    """Bytes as protocol 2 writes them, as latin1. Other codecs could expand a small file without limit."""
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    _need(isinstance(text, str) and encoding in ("latin1", "latin-1"), "bytes in it are not written as latin1")
    return text.encode("latin1")


def _keys(items: Any = ()) -> list:
    _need(isinstance(items, list | tuple | set | frozenset), "a set in it is made of something that is no list")
    return [check_key(item) for item in items]


def _ordered_dict(items: Any = ()) -> OrderedDict:
    good = isinstance(items, list | tuple) and all(isinstance(i, list | tuple) and len(i) == 2 for i in items)
    _need(good, "a dict in it is made of something that is no list of pairs")
    return OrderedDict(pairs([part for pair in items for part in pair]))


def _counter(counts: Any) -> Counter:
    _need(isinstance(counts, dict), "a Counter in it is made of something that is no dict")
    return Counter(dict(counts))


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    _need(
        all(isinstance(part, int | float) for part in (real, imaginary)),
        "a complex number in it has parts that are no numbers",
    )
    return complex(real, imaginary)


def _device(*parts: Any) -> str:
    """The name of a torch.device. Tensors are read into CPU memory anyway."""
    _need(len(parts) <= 2 and all(isinstance(part, str | int) for part in parts), "a device in it has no name")
    return ":".join(map(str, parts))


def _settings(*arguments: Any) -> Unbuilt:
    """The argparse options of a run, as a dict."""
    _need(not arguments, "options in it are no dict")
    return Unbuilt(lambda state: dict(state) if isinstance(state, dict) else {})


def _dtype(code: Any, *_: object) -> Unbuilt:
    match = re.fullmatch(r"[|<>=]?([a-z]\d{1,2})", code) if isinstance(code, str) else None
    if match is None or match[1] not in NUMBERS:
        raise RefusedName(f"numpy.dtype({code[:20] if isinstance(code, str) else type(code).__name__})")

    def build(state: Any) -> np.dtype:
        """state: version, byte order, then entries that only records, texts and dates have."""
        good = isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")
        _need(good and not any(state[2:5]), "a numpy dtype in it has fields")
        return np.dtype(match[1]).newbyteorder(state[1])

    return Unbuilt(build)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    """An array in the machine's byte order, over a copy of the data. Raises ValueError for another length."""
    _need(isinstance(dtype, np.dtype), "an array in it has no dtype")
    sizes, content = _whole_numbers(shape, "shape"), bytearray(_encoded(data))
    fits = math.prod(sizes) * dtype.itemsize == len(content)
    _need(fits, f"an array of shape {sizes} and type {dtype} has {len(content)} bytes")
    logical = dtype.kind == "b"  # only the bytes 0 and 1 are bools
    array = np.ndarray(sizes, np.dtype("u1") if logical else dtype, content, order="F" if order == "F" else "C")
    return array != 0 if logical else array.astype(dtype.newbyteorder("="), copy=False)


def _reconstruct(kind: object, *_: object) -> Unbuilt:
    """An array of numpy. Its state follows: version, shape, dtype, whether it is in Fortran order, data."""
    _need(kind is NDARRAY, "an array in it is of a class of its own")

    def build(state: Any) -> np.ndarray:
        _need(isinstance(state, tuple) and len(state) == 5, "an array in it has no state")
        return _array(state[4], state[2], state[1], "F" if state[3] else "C")

    return Unbuilt(build)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """An array of numpy in protocol 5. Order "K" means C order with permuted axes."""
    _need(order in ("C", "F", "K"), "an array in it has an unknown order")
    array = _array(data, dtype, shape, order)
    return array if axes is None else array.transpose(_whole_numbers(axes, "order of axes"))


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ())[()]


class Storage:
    """The numbers of tensors. `fill` may follow after tensors were made from it.

    Raises:
        ValueError: the length is no multiple of an element's size.
    """

    def __init__(self, dtype: Any, content: bytearray):
        _need(isinstance(dtype, torch.dtype), "a storage in it has no dtype")
        _need(len(content) % dtype.itemsize == 0, "a storage in it ends within a number")
        self.dtype, self.content = dtype, content
        self.flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        self.fill(content)

    def fill(self, data: bytes | bytearray) -> None:
        """Raises ValueError for data of another length."""
        _need(len(data) == len(self.content), f"a storage of {len(self.content)} bytes has {len(data)} in the file")
        self.content[:] = data
        if self.dtype == torch.bool:
            self.flat.view(torch.uint8).ne_(0)  # a bool is 0 or 1


def storage_size(dtype: Any, count: Any) -> int:
    """The size in bytes of a storage of `count` numbers. Raises ValueError."""
    _need(isinstance(dtype, torch.dtype) and type(count) is int and count >= 0, "a storage in it has no type or length")
    return count * dtype.itemsize


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> torch.Tensor:
    """A dense tensor within its storage, and no larger. Its requires_grad and its hooks are ignored."""
    _need(isinstance(storage, Storage), "a tensor in it has no storage")
    sizes, strides = _whole_numbers(size, "shape"), _whole_numbers(stride, "stride")
    (start,) = _whole_numbers([offset], "offset")
    _need(len(sizes) == len(strides), "a tensor in it has other strides than sizes")
    count, available = math.prod(sizes), len(storage.flat)
    last = start + sum((n - 1) * step for n, step in zip(sizes, strides)) if count else start - 1
    fits = last < available and count <= available
    _need(fits, f"a tensor of shape {sizes} reaches beyond its storage of {available} numbers")
    return storage.flat.as_strided(sizes, strides, start)


def _parameter(value: Any, *_: object) -> torch.Tensor:
    _need(isinstance(value, torch.Tensor), "a parameter in it is no tensor")
    return value


def _builtins() -> dict[tuple[str, str], object]:
    makers: dict[str, Callable] = {
        "set": lambda items=(): set(_keys(items)),
        "frozenset": lambda items=(): frozenset(_keys(items)),
        "bytes": _encoded,
        "bytearray": lambda *arguments: bytearray(_encoded(*arguments)),
        "complex": _complex,
    }
    return {(module, name): Maker(make) for module in ("builtins", "__builtin__") for name, make in makers.items()}


def _numpy() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {("numpy", "ndarray"): NDARRAY, ("numpy", "dtype"): Maker(_dtype)}
    for core in ("numpy.core", "numpy._core"):  # numpy 1's name and numpy 2's
        names[core + ".multiarray", "_reconstruct"] = Maker(_reconstruct)
        names[core + ".multiarray", "scalar"] = Maker(_scalar)
        names[core + ".numeric", "_frombuffer"] = Maker(_frombuffer)
    return names


def _torch() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {("torch", f"{name}Storage"): dtype for name, dtype in DTYPES.items()}
    names |= {("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()}
    names["torch._utils", "_rebuild_tensor"] = names["torch._utils", "_rebuild_tensor_v2"] = Maker(_tensor)
    names["torch._utils", "_rebuild_parameter"] = Maker(_parameter)
    names["torch", "Size"] = Maker(lambda sizes=(): _whole_numbers(sizes, "shape"))
    names["torch", "device"] = Maker(_device)
    return names


NAMES: dict[tuple[str, str], object] = {
    **_builtins(),
    **_numpy(),
    **_torch(),
    ("_codecs", "encode"): Maker(_encoded),
    ("collections", "OrderedDict"): Maker(_ordered_dict),
    ("collections", "Counter"): Maker(_counter),
    ("argparse", "Namespace"): Maker(_settings),
    **{(module, "CfgNode"): Maker(_ordered_dict) for module in ("yacs.config", "detectron2.config.config")},
}
