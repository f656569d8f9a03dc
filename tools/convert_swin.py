#!/usr/bin/env python3
"""Convert an original Swin Transformer checkpoint (.pth, ImageNet) to a backbone pickle (.pkl) for MODEL.WEIGHTS.

Usage: python tools/convert_swin.py swin_tiny_patch4_window7_224.pth swin_tiny_patch4_window7_224.pkl

The names stay as they are; the pickle only says that they are to be matched with the model's backbone.
"""

import argparse
import pickle
import sys
from pathlib import Path

import torch

from eco_m2f.command_line import run
from eco_m2f.files import atomic_write
from eco_m2f.safe_load import CheckpointError, read_checkpoint

PROBE = "patch_embed.proj.weight"


def backbone_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of an original Swin checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: no such file, or it holds something else.
    """
    weights = read_checkpoint(path)["model"]
    if PROBE not in weights:
        names = ", ".join(sorted(weights)[:3])
        raise CheckpointError(f"{path} is no original Swin checkpoint: it lacks {PROBE} (it holds {names}, ...)")
    return weights


def convert(source: Path, target: Path) -> str:
    """Write the pickle and return a line that tells what is in it."""
    if target.suffix != ".pkl":
        raise CheckpointError(f"{target} must end in .pkl, for that is how it is recognised when it is loaded")
    weights = backbone_weights(source)
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    with atomic_write(target) as file:
        pickle.dump({"model": arrays, "__author__": "third_party", "matching_heuristics": True}, file, protocol=4)
    stages = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    return f"{target}: {len(weights)} tensors, {stages} stages, width {weights[PROBE].shape[0]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the original .pth file")
    parser.add_argument("target", type=Path, help="the .pkl file to write")
    args = parser.parse_args(arguments)
    print(convert(args.source, args.target))


if __name__ == "__main__":
    sys.exit(run(main))
