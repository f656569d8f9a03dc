"""Converts a published DETR checkpoint (.pth, with a ResNet) to the names of this project's Detr and EcoDetr.

    python tools/convert_detr.py detr-r50-e632da11.pth detr_r50.pth

The backbone gets detectron2's names, the rest goes under `detr.`. COCO's published models have a class for each
category id from 0 to 90. The 80 ids in use are kept, in detectron2's order. Other numbers of classes do not change.
"""

import argparse
import sys
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog

from eco_m2f.checkpoint.published import check_target, resnet_name
from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint, write_weights
from eco_m2f.engine.command_line import converter_parser, run
from eco_m2f.files import atomic_write

BACKBONE = "backbone.0.body."
PROBES = ("transformer.encoder.layers.0.self_attn.in_proj_weight", f"{BACKBONE}conv1.weight", "class_embed.weight")
COCO_LOGITS = 92  # the category ids 0..90, and "no object"


def convert(source: Path, target: Path) -> str:
    """Writes the converted checkpoint and returns a line that describes it."""
    check_target(target, (".pth", ".safetensors"))
    weights = read_checkpoint(source)["model"]
    missing = [name for name in PROBES if name not in weights or not weights[name].dim()]
    if missing:
        names = ", ".join(sorted(weights)[:3])
        raise CheckpointError(
            f"{source} is no DETR checkpoint with a ResNet: it lacks {missing[0]}. It holds {names}, ..."
        )
    converted = converted_weights(weights)
    if target.suffix == ".safetensors":
        write_weights(target, converted)
    else:
        with atomic_write(target) as file:
            torch.save({"model": converted}, file)
    classes = len(converted["detr.class_embed.weight"]) - 1
    return f"{target}: {len(converted)} tensors, {classes} classes"


def converted_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under this project's names. Raises CheckpointError for an unknown name in the backbone."""
    converted = {}
    for name, value in weights.items():
        if name.startswith(BACKBONE):
            new = resnet_name(name.removeprefix(BACKBONE))
            if new is not None:
                converted[f"backbone.{new}"] = value
        else:
            converted[f"detr.{name}"] = contiguous_classes(value) if name.startswith("class_embed.") else value
    return converted


def contiguous_classes(value: torch.Tensor) -> torch.Tensor:
    """The rows for COCO's 80 categories and "no object" of a classifier over the category ids 0..90."""
    if value.shape[:1] != (COCO_LOGITS,):
        return value
    category = {i: k for k, i in MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id.items()}
    return value[[*(category[i] for i in range(len(category))), COCO_LOGITS - 1]].clone()


def build_parser() -> argparse.ArgumentParser:
    return converter_parser(__doc__, ".pth or .safetensors")


def main(args: argparse.Namespace) -> None:
    print(convert(args.source, args.target))


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
