"""Measures a training step of Step A with 1, 2 and all exits: seconds and peak memory.

    python tools/benchmarks/step_a.py --threads 2 --rounds 2 --size 384 384 --config-file \\
        configs/coco/panoptic-segmentation/eco/eco_maskformer2_R50_bs16_50ep.yaml

A step holds all graphs at once (joint), or decodes exits again in the backward pass (recompute). The peak is relative
to the memory before the first step. Each setting runs in its own process. timing.py describes the timing.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import timing
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from timing import positive

from eco_m2f.engine.command_line import run
from eco_m2f.engine.optimizer import build_optimizer
from eco_m2f.engine.setup import build_model, load_cfg


def training_step(config: str, opts: Sequence, size: Sequence[int], batch: int, rounds: int) -> tuple[float, float]:
    """(median seconds of a step, peak MiB above the memory before the first step), on random images of 20 masks."""
    timing.keep_freed_memory("cpu")
    cfg = load_cfg(config, list(opts))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    inputs = [random_image(size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) for _ in range(batch)]

    def step() -> None:
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()

    device = "cpu" if cfg.MODEL.DEVICE == "cpu" else "cuda"
    before = torch.cuda.memory_allocated() if device == "cuda" else peak_bytes(device)
    with EventStorage(0):
        step()
        times = [timing.timed(step, device)[0] for _ in range(rounds)]
    return statistics.median(times) / 1e3, (peak_bytes(device) - before) / 2**20


def random_image(size: Sequence[int], num_classes: int) -> dict:
    instances = Instances(tuple(size))
    instances.gt_classes = torch.randint(num_classes, (20,))
    blobs = torch.nn.functional.interpolate(torch.randn(1, 20, 8, 8), tuple(size), mode="bicubic")[0]
    instances.gt_masks = blobs.argmax(0) == torch.arange(20)[:, None, None]  # [20, H, W]
    return {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "instances": instances}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_of(args: argparse.Namespace, exits: list[int], recompute: bool) -> dict:
    """Measures one setting in its own process."""
    opts = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", "MODEL.ECO.EXITS", exits]
    opts += ["MODEL.ECO.EXITS_PER_STEP", len(exits), "MODEL.ECO.RECOMPUTE", recompute, "MODEL.ECO.EXIT", exits[-1]]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, timing.use_threads, (args.threads,)) as process:
        work = process.submit(training_step, args.config_file, opts, args.size, args.batch, args.rounds)
        seconds, memory = work.result()
    way = "recompute" if recompute else "joint"
    return {"exits": len(exits), "way": way, "s_per_step": seconds, "peak_mib": memory}


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=3)
    timing.add_model_options(parser, "an EcoMaskFormer", [512, 512])
    parser.add_argument("--batch", type=positive, default=1)
    return parser


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    exits = list(load_cfg(args.config_file).MODEL.ECO.EXITS)
    rows = []
    for n, recompute in [(1, False), *((n, again) for n in (2, len(exits)) for again in (False, True))]:
        row = row_of(args, exits[-n:], recompute)
        first = rows[0] if rows else row
        row["time_ratio"] = row["s_per_step"] / first["s_per_step"]
        row["memory_ratio"] = row["peak_mib"] / (first["peak_mib"] or math.nan)
        rows.append(row)
        print(timing.as_line(row), flush=True)
    setting = {**timing.model_setting(args), "batch": args.batch}
    timing.save(args, [{**setting, **row} for row in rows])


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
