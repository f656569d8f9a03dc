"""Writes only the weights of a checkpoint (.pth, .pkl) as .safetensors, to share or deploy them.

    python tools/export_weights.py eco.pth eco.safetensors

The classes are kept; the optimizer's state and everything else is left out. The file holds the sha256 of its weights,
which is checked at each loading. Nothing in it can run code. MODEL.WEIGHTS takes it like a .pth; --resume needs the
.pth.
"""

import argparse
import json
import sys
from pathlib import Path

from eco_m2f.checkpoint.published import check_target
from eco_m2f.checkpoint.safe_load import read_checkpoint, write_weights
from eco_m2f.engine.command_line import converter_parser, run


def export(source: Path, target: Path) -> str:
    """Writes the weights and returns a line that describes the file."""
    check_target(target, (".safetensors",))
    checkpoint = read_checkpoint(source)
    weights = checkpoint["model"]
    notes = {"__author__": checkpoint["__author__"]} if isinstance(checkpoint.get("__author__"), str) else {}
    if checkpoint.get("matching_heuristics") is True:
        notes["matching_heuristics"] = "True"
    if "classes" in checkpoint:
        notes["classes"] = json.dumps(checkpoint["classes"])
    write_weights(target, weights, **notes)
    return f"{target}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} numbers"


def build_parser() -> argparse.ArgumentParser:
    return converter_parser(__doc__, ".safetensors")


def main(args: argparse.Namespace) -> None:
    print(export(args.source, args.target))


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
