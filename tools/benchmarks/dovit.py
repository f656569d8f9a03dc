"""Measures images per second of a whole DoViT with random weights, while a given share of the tokens stops.

    python tools/benchmarks/dovit.py --threads 2 --output output/dovit_cpu.csv --config-file \\
        configs/cityscapes/semantic-segmentation/dovit/dovit_vit_base_naive_bs16_90k.yaml

Random tokens stop at the first decision point. Share 0 is the static model; else the auxiliary heads run as usual.
timing.py describes the timing.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import timing
import torch
from timing import positive
from torch import Tensor

from eco_m2f.costs import cost_table, padded_size
from eco_m2f.engine.command_line import run
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.modeling import DoViT


class StopShare:
    """A stop rule: at the first decision point, a random share of each image's tokens stops; later none."""

    def __init__(self, heads: Sequence[torch.nn.Module], share: float):
        self.heads, self.share = heads, share
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, point: int, features: Tensor) -> Tensor:
        self.heads[point](features)  # for its time
        sure = torch.zeros(len(features), features[0, 0].numel(), dtype=torch.bool)  # [B, h * w]
        if point == 0:
            order = torch.rand(sure.shape, generator=self.generator).argsort(dim=1)
            sure.scatter_(1, order[:, : round(self.share * sure.shape[1])], True)
        return sure.view(len(features), *features.shape[2:]).to(features.device)


def dovit_contestants(
    cfg, size: tuple[int, int], batch: int, shares: Sequence[float]
) -> tuple[DoViT, dict[str, Callable[[], list[dict]]]]:
    """The model, and {name: call that segments a batch}, the largest share first. Raises ValueError without DoViT."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if not isinstance(model, DoViT):
        raise ValueError(f"--config-file is of a {type(model).__name__}: take one of a DoViT, see configs/*/*/dovit/")
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)

    def segment(share: float) -> list[dict]:
        model.stop_rule = lambda: StopShare(model.auxiliary_heads, share) if share else None
        return model([{"image": image} for image in images])

    return model, {f"{100 * s:g} % stopped": functools.partial(segment, s) for s in sorted(shares, reverse=True)}


def with_throughput(row: dict, batch: int, gflops: float, static_gflops: float) -> dict:
    """A row of times, with images per second and GFLOPs."""
    speed = {"images_per_s": f"{1e3 * batch / float(row['wall_ms']):.3f}"}
    return {**row, **speed, "gflops": f"{gflops:.2f}", "static_gflops": f"{static_gflops:.2f}"}


def gflops_of(model: DoViT, size: tuple[int, int], kept: Sequence[float]) -> tuple[float, float]:
    """GFLOPs of an image with these shares of tokens that go on, and of the static model."""
    costs = cost_table(model, {"stopped": kept}).details(padded_size(size, model.size_divisibility), size)
    static = costs["static"]["total"]
    return (costs["stopped"]["total"] if min(kept) < 1 else static), static  # without stops no auxiliary heads run


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share below 1")
    return float(text)


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=5)
    timing.add_model_options(parser, "a DoViT", [512, 512])
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--stopped", type=share, nargs="+", default=[0.0, 0.5], help="shares of the tokens that stop")
    return parser


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    timing.keep_freed_memory(args.device)
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", args.device])
    model, contestants = dovit_contestants(cfg, tuple(args.size), args.batch, args.stopped)
    rows = []
    for row in timing.measure(contestants, args.rounds, args.device):
        kept = contestants[row["contestant"]]()[0]["tokens"]["kept"]
        rows.append(with_throughput(row, args.batch, *gflops_of(model, tuple(args.size), kept)))
        print(timing.as_line(rows[-1]), flush=True)
    setting = {**timing.model_setting(args), "batch": args.batch}
    timing.save(args, [{**setting, **row} for row in rows])


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
