"""Reads published backbones, renames their tensors, and writes them as a file for MODEL.WEIGHTS."""

import os
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files import atomic_write, prepare_output
from .errors import CheckpointError
from .safe_load import SHA256, STATE_DICTS, read_checkpoint, weights_sha256, write_weights

SWIN = "layers.0.blocks.0.attn.relative_position_bias_table"  # a tensor that only a Swin has
RESNET = "layer1.0.conv3.weight"  # a tensor that only a ResNet with bottlenecks has
SWIN_BLOCK = [
    f"{name}.{kind}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
SWIN_BLOCK.append("attn.relative_position_bias_table")
NORM = ("weight", "bias", "running_mean", "running_var")
RESNET_BLOCK = [f"conv{i}.{name}" for i in (1, 2, 3) for name in ("weight", *(f"norm.{kind}" for kind in NORM))]


@dataclass(frozen=True)
class PublishedBackbone:
    """weights: tensors by their names in the backbone. left_out: the number of other tensors, by first word."""

    layout: str
    weights: dict[str, Tensor]
    left_out: Counter[str]


def read_backbone(path: str | os.PathLike) -> PublishedBackbone:
    """The backbone in a published checkpoint. Its tensors' names identify it.

    It reads original Swin weights, MoBY's Swin, torchvision's ResNets with bottlenecks, and DINO's, which have the same
    names. Of MoBY it takes the online encoder, which its authors fine-tune. Of a full DINO checkpoint it takes the
    teacher, which its authors also publish alone.

    Raises:
        FileNotFoundError, CheckpointError: there is no such file, it holds something else, or a block is incomplete.
    """
    weights = read_checkpoint(path, keys=(*STATE_DICTS, "teacher"))["model"]
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    layout = next((known for known in LAYOUTS if known.prefix + known.probe in weights), None)
    if layout is None:
        known = ", ".join(f"{known.name} has {known.prefix}{known.probe}" for known in LAYOUTS)
        names = ", ".join(sorted(weights)[:3])
        raise CheckpointError(f"{path} holds no known backbone ({known}): it holds {names}, ...")
    taken: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for name, value in weights.items():
        new = layout.rename(name.removeprefix(layout.prefix)) if name.startswith(layout.prefix) else None
        if new is None:
            left_out[name.partition(".")[0]] += 1
        else:
            taken[new] = value
    _check_blocks(taken, layout.block, path)
    return PublishedBackbone(layout.name, taken, left_out)


def check_target(path: str | os.PathLike, suffixes: Sequence[str] = (".pkl", ".safetensors")) -> None:
    """Checks the path of a weights file and makes its folder, before the work. suffixes: by default a backbone's.

    Raises:
        CheckpointError: the path has none of these suffixes.
        ValueError: it cannot be written, see `prepare_output`.
    """
    if Path(path).suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise CheckpointError(f"{path} must end in {wanted}, because the loader goes by the suffix")
    prepare_output(path)


def write_backbone(path: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Writes a file for MODEL.WEIGHTS. Loading matches its tensors with a model's backbone by their names.

    Raises:
        CheckpointError: see `check_target`.
    """
    check_target(path)
    if Path(path).suffix == ".safetensors":
        write_weights(path, weights, __author__="third_party", matching_heuristics="True")
        return
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    with atomic_write(path) as file:
        pickle.dump({**content, SHA256: weights_sha256(weights)}, file, protocol=4)


def swin_name(name: str) -> str | None:
    """The same name, or None if the backbone does not use the tensor.

    It does not use the classifier, the norm before it (the backbone has one norm per map), and masks of a fixed size.
    """
    used = name.startswith(("patch_embed.", "layers.", "absolute_pos_embed")) and not name.endswith(".attn_mask")
    return name if used else None


def resnet_name(name: str) -> str | None:
    """torchvision's name of a ResNet's tensor -> detectron2's. None for the classifier and step counters.

    Example: `layer1.0.bn2.weight` -> `res2.0.conv2.norm.weight`.

    Raises:
        CheckpointError: a ResNet with bottlenecks has no such name.
    """
    if name.startswith("fc.") or name.endswith(".num_batches_tracked"):
        return None
    stem = re.fullmatch(r"(conv|bn)1\.(\w+)", name)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn' else ''}{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([1-3])|downsample\.([01]))\.(\w+)", name)
    if block is None:
        raise CheckpointError(f"{name} is no name of a ResNet with bottlenecks. Only these can be converted")
    stage, number, kind, index, shortcut, tensor = block.groups()
    part = f"conv{index}" if kind else "shortcut"
    norm = "norm." if kind == "bn" or shortcut == "1" else ""
    return f"res{int(stage) + 1}.{number}.{part}.{norm}{tensor}"


@dataclass(frozen=True)
class Layout:
    """A naming of a backbone: its prefix, a tensor that identifies it, and the renamed tensors of a block."""

    name: str
    prefix: str
    probe: str
    block: list[str]
    rename: Callable[[str], str | None]


LAYOUTS = (
    Layout("Swin", "", SWIN, SWIN_BLOCK, swin_name),
    Layout("MoBY's online Swin", "encoder.", SWIN, SWIN_BLOCK, swin_name),
    Layout("ResNet", "", RESNET, RESNET_BLOCK, resnet_name),
    Layout("DINO's ResNet", "backbone.", RESNET, RESNET_BLOCK, resnet_name),
)


def _check_blocks(weights: Mapping[str, Tensor], wanted: list[str], path: str | os.PathLike) -> None:
    """Raises CheckpointError unless every block has the wanted tensors."""
    blocks = defaultdict(set)
    for name in weights:
        if match := re.fullmatch(r"(layers\.\d+\.blocks\.\d+|res\d\.\d+)\.(.+)", name):
            blocks[match[1]].add(match[2])
    missing = [f"{block}.{name}" for block, found in blocks.items() for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its blocks, such as {missing[0]}")
