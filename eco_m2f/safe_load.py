"""Reads weights from .pth and .pkl files without running code from them.

Both are pickles at heart, and opening a pickle may call anything. Here it may call only what makes arrays, numbers and
builtin containers; whatever else it names is refused by that name.
"""

import functools
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

# What a cut, overwritten or hostile file makes the two readers raise.
MALFORMED: tuple[type[Exception], ...] = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError)
MALFORMED += (AttributeError, LookupError, OSError, MemoryError, OverflowError, AssertionError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: which file, why, and what to do about it."""


def read_checkpoint(path: str | os.PathLike, keys: Sequence[str] = ("model",)) -> dict:
    """Read a .pth or .pkl file without running code from it.

    Args:
        keys: where its state dict may be, the first that is there being taken; without any the file is a state dict.

    Returns:
        a dict with the state dict under "model", and whatever else the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, holds no state dict, or wants anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: check MODEL.WEIGHTS, or train or download it first")
    try:
        bare_pickle = path.suffix == ".pkl" and not zipfile.is_zipfile(path)  # an archive is torch.save's
        data = _read_pickle(path) if bare_pickle else _read_torch(path)
    except MALFORMED as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return _with_model(data, path, keys)


def _unreadable(path: Path, error: Exception) -> str:
    refused = re.search(r"[Uu]nsupported (?:class|global|GLOBAL):?(?: GLOBAL)? ([\w.]+)", str(error))
    if refused:
        return (
            f"{path} was refused, for it names {refused[1]}, and only arrays, numbers and containers are taken: more "
            'could run code. Where you trust its source, save its state dict alone: torch.save({"model": ...}, path)'
        )
    # torch's first line would advise to open the file unsafely; its last but one tells the reason.
    detail = re.search(r"WeightsUnpickler error: (.*)", str(error))
    reason = detail[1] if detail else str(error).partition("\n")[0] or type(error).__name__
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read ({reason}): it may be "
        "truncated or no checkpoint at all. Compare its size and sha256 with its source's, and save or fetch it again"
    )


def _read_torch(path: Path) -> object:
    # The options of a run, which many trainings save: read as dicts, their classes are not made.
    settings = [(OrderedDict, name) for name in ("argparse.Namespace", "yacs.config.CfgNode")]
    with torch.serialization.safe_globals([*_numpy_types(), *settings]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_pickle(path: Path) -> object:
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()  # latin1: arrays pickled by Python 2


def _with_model(data: object, path: Path, keys: Sequence[str]) -> dict:
    """The file's content with its state dict under "model"; a bare one is wrapped. Values must be arrays."""
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{path} holds a {type(data).__name__} where a dict of weights was expected")
    key = next((key for key in keys if key in data), None)
    data = _wrap_bare(dict(data), path) if key is None else {**data, "model": data[key]}
    if not isinstance(data["model"], Mapping) or not data["model"]:
        raise CheckpointError(f'{path} holds no weights under "{key}", but a {type(data["model"]).__name__}')
    for key, value in data["model"].items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not an array: no state dict")
    # A copy of each array: those from a pickle may be read-only, which a tensor must not share.
    tensors = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in data["model"].items()}
    return {**data, "model": tensors}


def _wrap_bare(data: dict, path: Path) -> dict:
    """A bare state dict; as a pickle, that is how Caffe2 models were published, under names of their own."""
    if path.suffix != ".pkl":
        return {"model": data}
    weights = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _numpy_functions() -> tuple:
    """The functions that a pickled array (protocols 2-4 and 5) and a pickled number name; private ones in numpy."""
    array = np.zeros(1)
    return array.__reduce__()[0], array.__reduce_ex__(5)[0], np.float64(0).__reduce__()[0]


def _numpy_types() -> list:
    """What torch.load may call beyond its own list: makers of numpy's plain data, so not of arrays of objects."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    return [np.ndarray, np.dtype, *_numpy_functions(), *dtypes]


def _load_storage(data: bytes) -> torch.TypedStorage:
    """In place of torch.storage._load_from_bytes, which would open these bytes as an arbitrary pickle."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


@functools.cache
def _plain_constructors() -> dict[tuple[str, str], object]:
    """What a .pkl may call: makers of builtin containers, of arrays, and of tensors (a converted Swin's)."""
    reconstruct, frombuffer, scalar = _numpy_functions()
    allowed: dict[tuple[str, str], object] = {("builtins", t.__name__): t for t in (set, frozenset, bytearray, complex)}
    for core in ("numpy.core", "numpy._core"):  # numpy 1's name and numpy 2's
        allowed[core + ".multiarray", "_reconstruct"] = reconstruct
        allowed[core + ".multiarray", "scalar"] = scalar
        allowed[core + ".numeric", "_frombuffer"] = frombuffer
    allowed["numpy", "ndarray"] = np.ndarray
    allowed["numpy", "dtype"] = np.dtype
    allowed["_codecs", "encode"] = _encode_latin1
    allowed["collections", "OrderedDict"] = OrderedDict
    allowed["torch._utils", "_rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
    allowed["torch.storage", "_load_from_bytes"] = _load_storage
    return allowed


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as protocol 2 spells them. Other codecs could expand a small file without bound."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Refuses, by name, every class and function that does not make plain data."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _plain_constructors()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported class {module}.{name}") from None
