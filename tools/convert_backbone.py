"""Converts a published backbone (.pth) to a file for MODEL.WEIGHTS (.pkl or .safetensors).

    python tools/convert_backbone.py swin_tiny_patch4_window7_224.pth swin_tiny_patch4_window7_224.pkl
    python tools/convert_backbone.py moby_swin_t_300ep_pretrained.pth moby_swin_t_300ep_pretrained.pkl
    python tools/convert_backbone.py dino_resnet50_pretrain.pth dino_resnet50_pretrain.pkl

The names in the file identify it. It may hold original Swin weights, MoBY's Swin, torchvision's ResNet with
bottlenecks, DINO's ResNet, or a full checkpoint of DINO. Of MoBY the online encoder is used, of DINO the teacher. All
were trained on RGB images, normalised as in the configs.
"""

import argparse
import re
import sys
from pathlib import Path

from eco_m2f.checkpoint.published import check_target, read_backbone, write_backbone
from eco_m2f.engine.command_line import converter_parser, run


def convert(source: Path, target: Path) -> str:
    """Writes the file and returns a line that describes it."""
    check_target(target)
    found = read_backbone(source)
    write_backbone(target, found.weights)
    blocks = {match[0] for name in found.weights if (match := re.match(r"(layers\.\d+\.blocks|res\d)\.\d+\.", name))}
    line = f"{target}: {found.layout}, {len(found.weights)} tensors, {len(blocks)} blocks"
    left_out = ", ".join(f"{word} ({count})" for word, count in sorted(found.left_out.items()))
    return f"{line}; left out: {left_out or 'nothing'}"


def build_parser() -> argparse.ArgumentParser:
    return converter_parser(__doc__, ".pkl or .safetensors")


def main(args: argparse.Namespace) -> None:
    print(convert(args.source, args.target))


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
