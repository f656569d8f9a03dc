"""The file of a gate: its tensors and plain values, with a digest of both that shows any damage.

A name that ends in .safetensors gives that format, with the values as JSON in the metadata. Any other name gives
PyTorch's archive. Reading either runs no code. Archives of the older format have no digest: the checksums of the
archive are checked instead.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..checkpoint.safe_load import weights_sha256
from ..checkpoint.torch_files import check_checksums, read_archive
from ..files import atomic_write

FORMAT = "eco_m2f.gate.v2"
OLD_FORMAT = "eco_m2f.gate.v1"
TENSORS = ("weight", "bias")
METADATA = "eco_m2f"


def write_gate(path: Path, content: Mapping) -> None:
    """Writes a gate whole or not at all. content: `TENSORS`, and values that JSON holds; others raise ValueError."""
    values = {name: value for name, value in content.items() if name not in TENSORS}
    try:
        values = json.loads(json.dumps({"format": FORMAT, **values}))  # as a reader gets them: tuples become lists
    except TypeError as error:
        raise ValueError(f"the gate cannot be written to {path}: {error}") from error
    tensors = {name: content[name].detach().cpu().contiguous() for name in TENSORS}
    values["sha256"] = _digest(tensors, values)
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            file.write(safetensors.torch.save(tensors, {METADATA: json.dumps(values, sort_keys=True)}))
        else:
            torch.save({**tensors, **values}, file)


def read_gate(path: Path) -> dict:
    """The content that `write_gate` wrote. Raises ValueError, naming the file, for a damaged file or another file."""
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
        version, changed = _pop_format(content)
    except Exception as error:  # a broken file can make these readers raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no whole gate file ({reason}): fit it with tools/train_gate.py") from error
    if version not in (FORMAT, OLD_FORMAT):
        raise ValueError(f"{path} is not a gate file of format {FORMAT}: fit one with tools/train_gate.py")
    if changed:
        raise ValueError(f"{path} was changed after it was written: copy it again, or fit it with tools/train_gate.py")
    return content


def _pop_format(content: dict) -> tuple[object, bool]:
    """Removes format and digest from a file's content. Returns the format, and whether the digest does not match."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return content.pop("format", None) if isinstance(content, dict) else None, False
    digest = content.pop("sha256", None)
    values = {name: value for name, value in content.items() if name not in TENSORS}
    content.pop("format")
    return FORMAT, digest != _digest({name: content[name] for name in TENSORS}, values)


def _digest(tensors: Mapping[str, Tensor], values: Mapping) -> str:
    return hashlib.sha256((json.dumps(values, sort_keys=True) + weights_sha256(tensors)).encode()).hexdigest()


def _read_safetensors(path: Path) -> dict:
    with safetensors.safe_open(path, framework="pt") as file:
        values = json.loads((file.metadata() or {})[METADATA])
        return {**{name: file.get_tensor(name).clone() for name in file.keys()}, **values}


def _read_archive(path: Path) -> dict:
    check_checksums(path)
    content = read_archive(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return dict(content)
