"""Times the first image of a size against the next one of that size.

Every round takes a size that the model has not seen: 32 pixels wider than that of the round before. The image runs
twice. What the first run costs more is what the model, PyTorch and oneDNN prepare for a size.
"""

import argparse
import statistics
import sys

import timing
import torch

from eco_m2f.engine.command_line import run
from eco_m2f.engine.setup import build_model, load_cfg

STEP = 32  # pixels: every round has a padded size of its own


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=5)
    timing.add_model_options(parser, "any model", [800, 1216])
    return parser


@torch.no_grad()
def first_and_later(model: torch.nn.Module, height: int, width: int, device: str) -> tuple[float, float]:
    """Wall milliseconds of the first and of the second image of a size."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    x = {"image": image, "height": height, "width": width, "image_id": 0}
    first, later = (timing.timed(lambda: model([x]), device)[0] for _ in range(2))
    return first, later


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    timing.keep_freed_memory(args.device)
    torch.manual_seed(0)
    model = build_model(load_cfg(args.config_file, ["MODEL.DEVICE", args.device])).eval()
    height, width = args.size
    first_and_later(model, height, width - STEP, args.device)  # warms up
    times = [first_and_later(model, height, width + STEP * i, args.device) for i in range(args.rounds)]
    first, later = (statistics.median(values) for values in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    row = {"first_ms": f"{first:.1f}", "later_ms": f"{later:.1f}", "ratio": f"{ratio:.3f}"}
    print(timing.as_line(row), flush=True)
    timing.save(args, [{**timing.model_setting(args), **row}])


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
