"""Measures Step C on generated features: one gate with each optimizer, and the frontier of 240 gates.

    python tools/benchmarks/step_c.py --threads 2 --output output/step_c.csv

The default number of images is that of COCO. timing.py describes the timing.
"""

import argparse
import functools
import resource
import sys
from collections.abc import Callable, Iterator

import numpy as np
import timing
import torch
from timing import positive

from eco_m2f.engine.command_line import give_back_freed_memory, run
from eco_m2f.exits import GATE_LOSSES
from eco_m2f.gates.fit import fit_gate, fit_gates

EXITS = (2, 3, 4, 5, 6)
SOURCE = {"feature_source": "res5", "parent_sha256": "0" * 64}


def random_images(count: int, channels: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features [N, C], and qualities [N, 5] in which a feature decides how much deeper exits pay."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, channels, generator=generator)
    need = torch.sigmoid(features[:, :1] + 0.5 * torch.randn(count, 1, generator=generator))
    quality = 0.6 - 0.004 * need * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    return features, (quality + 0.002 * torch.randn(quality.shape, generator=generator)).double().numpy()


def works(args: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(what is fitted, the number of gates, the call)."""
    features, quality = random_images(args.images, args.channels)
    for optimizer in ("lbfgs", "adam"):
        fit = functools.partial(fit_gate, features, quality, EXITS, 0.0005, 6, optimizer=optimizer, **SOURCE)
        yield f"one gate, {optimizer}", 1, fit
    betas = np.geomspace(1e-5, 1e-2, args.betas).tolist()
    grid = [(beta, k, loss) for k in (6, 5, 4) for beta in betas for loss in GATE_LOSSES]
    frontier = functools.partial(fit_gates, features, quality, EXITS, grid, **SOURCE)
    yield "frontier over beta, K and loss, lbfgs", len(grid), frontier


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=3, with_device=False)
    parser.add_argument("--images", type=positive, default=118287)
    parser.add_argument("--channels", type=positive, default=2048)
    parser.add_argument("--betas", type=positive, default=20, help="in the frontier, with 3 K and 4 losses each")
    return parser


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    give_back_freed_memory()  # as train_gate.py does
    rows = []
    for what, gates, fit in works(args):
        seconds = timing.timed(fit, "cpu")[0] / 1e3
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"what": what, "gates": gates, "seconds": seconds, "peak_gib_of_the_process": memory})
        print(timing.as_line(rows[-1]), flush=True)
    timing.save(args, [{"images": args.images, "channels": args.channels, **row} for row in rows])


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
