"""Reads weights from .pth, .pkl and .safetensors files without running code from them.

.pth and .pkl files contain pickles, and opening a pickle may call anything. `plain_pickle.py` reads them as plain data
instead, within limits set by the file's size. Checksums show damage: the CRC-32 of each record of an archive, and the
sha256 of the weights in files of `write_weights` and `write_backbone`.
"""

import contextlib
import hashlib
import json
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from ..files import atomic_write
from .errors import CheckpointError
from .plain_pickle import Budget, Maker, PlainUnpickler, RefusedName
from .plain_values import NAMES
from .torch_files import check_checksums, read_archive, read_legacy, storage_from_bytes

# The keys of a state dict in a checkpoint, in the order of preference: detectron2 and most others, Lightning and
# OpenMMLab, hand-written loops, and last the moving average of the weights.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "model_state", "model_ema")
SHA256 = "weights_sha256"
# Parameter names begin like this in frameworks whose checkpoints cannot be loaded.
FOREIGN = {
    "mmdetection": ("panoptic_head.", "bbox_head.", "rpn_head.", "roi_head."),
    "mmsegmentation": ("decode_head.", "auxiliary_head."),
    "Hugging Face transformers": ("model.pixel_level_module.", "model.transformer_module."),
}


def read_checkpoint(path: str | os.PathLike, keys: Sequence[str] = STATE_DICTS) -> dict:
    """Reads the weights in a .pth, .pkl or .safetensors file without running code from it.

    Args:
        keys: of the state dict; the first that exists is used. If none does, the file itself is a state dict.

    Returns:
        a dict with the state dict under "model", and the rest of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds no state dict, or holds more than plain data.
    """
    path = Path(path)
    return _with_model(read_plain(path), path, keys)


def read_plain(path: str | os.PathLike) -> object:
    """The content of a .pth, .pkl or .safetensors file: numbers, strings, containers, arrays and tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: check MODEL.WEIGHTS, or first train or download it")
    with explained(path):
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):  # whatever its suffix
            return read_archive(path)
        with _mapped(path) as (stream, size):
            if stream[:4] == b"PK\x03\x04":
                raise ValueError("it begins like an archive, but the end is missing")
            if path.suffix != ".pkl":
                return read_legacy(stream, size)
            names = {**NAMES, ("torch.storage", "_load_from_bytes"): Maker(storage_from_bytes)}
            return PlainUnpickler(stream, Budget(size), names).load()


def check_archive(path: str | os.PathLike) -> None:
    """Compares every record of a .pth file with its CRC-32. 200 MB take about a fifth of a second.

    Raises:
        CheckpointError: it is no archive of torch.save, or is truncated or damaged. The message names the file.
    """
    with explained(Path(path)):
        check_checksums(path)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns any error that a malformed file raises in the block into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except RefusedName as error:
        raise CheckpointError(_refused(path, error.name)) from error
    except Exception as error:  # untrusted bytes can make a parser raise anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read ({reason}): it may be truncated, damaged or no "
            "checkpoint at all. Compare its size and sha256 with the source's, or save or download it again"
        ) from error


def _refused(path: Path, name: str) -> str:
    if name.partition(".")[0] in ("mmengine", "mmcv", "mmdet"):
        return _foreign(path, "OpenMMLab", name)
    return (
        f"{path} was refused: it names {name}. Only arrays, numbers and containers are allowed, because anything "
        'else could run code. If you trust its source, save only its state dict: torch.save({"model": ...}, path)'
    )


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[tuple[mmap.mmap, int]]:
    """The file's bytes as a mapping, and their number."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content, len(content)


def _read_safetensors(path: Path) -> dict:
    _check_names_once(path)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}
    content: dict[str, Any] = {"model": weights}
    content |= {key: notes[key] for key in ("__author__", SHA256) if key in notes}
    if "classes" in notes:  # the Checkpointer checks them
        content["classes"] = json.loads(notes["classes"])
    return content | ({"matching_heuristics": True} if notes.get("matching_heuristics") == "True" else {})


def _check_names_once(path: Path) -> None:
    """Raises ValueError if the header names a tensor twice. The reader would silently take one of them."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(length, path.stat().st_size))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("its header holds a name twice")
        return dict(pairs)

    json.loads(header, object_pairs_hook=once)


def _with_model(data: object, path: Path, keys: Sequence[str]) -> dict:
    """The file's content with its state dict under "model". Raises CheckpointError unless its values are arrays."""
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{path} holds a {type(data).__name__}, but a dict of weights was expected")
    key = next((key for key in keys if key in data), None)
    data = _wrap_bare(dict(data), path) if key is None else {**data, "model": data[key]}
    if not isinstance(data["model"], Mapping) or not data["model"]:
        raise CheckpointError(f'{path} holds no weights under "{key}", but a {type(data["model"]).__name__}')
    _check_origin(data, path)
    data["model"] = {name: _tensor(name, value, path) for name, value in data["model"].items()}
    stated = data.pop(SHA256, None)
    if stated is not None and (not isinstance(stated, str) or stated != weights_sha256(data["model"])):
        raise CheckpointError(f"{path} is damaged: its weights do not have the stated sha256. Make it again")
    return data


def _tensor(name: object, value: object, path: Path) -> torch.Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor | np.ndarray):
        raise CheckpointError(f"{path}: {repr(name)[:80]} is a {type(value).__name__}, not an array: no state dict")
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _wrap_bare(data: dict, path: Path) -> dict:
    """Wraps a bare state dict. A .pkl is a Caffe2 model, which has its own names."""
    if path.suffix != ".pkl":
        return {"model": data}
    blobs = data.get("blobs", data)
    if not isinstance(blobs, Mapping):
        raise CheckpointError(f'{path} holds no weights under "blobs", but a {type(blobs).__name__}')
    weights = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _check_origin(data: Mapping, path: Path) -> None:
    """Raises CheckpointError for the weights of a framework that is known to use other names."""
    names = [name for name in data["model"] if isinstance(name, str)]
    notes = data.get("meta")
    if isinstance(notes, Mapping) and "mmdet_version" in notes:
        raise CheckpointError(_foreign(path, "mmdetection", "its meta has mmdet_version"))
    for framework, prefixes in FOREIGN.items():
        found = next((name for name in names if name.removeprefix("module.").startswith(prefixes)), None)
        if found is not None:
            raise CheckpointError(_foreign(path, framework, found))


def _foreign(path: Path, framework: str, sign: str) -> str:
    return (
        f"{path} is a checkpoint of {framework} ({sign}). Its parameters have other names and partly another layout, "
        "so it cannot be loaded. Use the weights that Mask2Former's or DETR's authors publish, or train the parent"
    )


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of names, types, shapes and values. Order and file format do not matter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_weights(path: str | os.PathLike, weights: Mapping[str, torch.Tensor], **notes: str) -> None:
    """Writes weights as .safetensors with their sha256, whole or not at all.

    Args:
        notes: strings to store with them. `read_checkpoint` returns `__author__`, `matching_heuristics` and `classes`
            (written as JSON).
    """
    # Copies, because safetensors refuses weights that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={**notes, SHA256: weights_sha256(tensors)}))
