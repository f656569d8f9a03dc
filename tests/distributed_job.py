"""Runs in every process of tests/test_distributed.py: a few training steps, and an evaluation.

Rank 0 writes {name}.pth, the weights after training, and results.json. Every rank writes {name}.rank{r}.json, the
sampler's draws and a digest of its weights. losses.json has the losses of a whole training, whole.pth its weights.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from detectron2.utils import comm
from minis import CONFIGS, ECO, MINI, PARENT, build, fill, make_batch

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.optimizer import autocast, build_optimizer
from eco_m2f.engine.predict import build_trained
from eco_m2f.engine.setup import load_cfg
from eco_m2f.engine.step import Step
from eco_m2f.engine.train import Trainer, distributed, trains_some_exits

ONE_EXIT = ("MODEL.ECO.EXITS_PER_STEP", 1)
CASES = {  # name: config, its options, number of masks of each image, accumulated batches
    "parent": (PARENT, (), (3, 3), 1),
    "one_exit_per_step": (ECO, ONE_EXIT, (3, 3), 1),
    "exits_to_5": (ECO, ("MODEL.ECO.EXITS", (3, 5), "MODEL.ECO.EXITS_PER_STEP", 2, "MODEL.ECO.EXIT", 5), (3, 3), 1),
    # the class loss is a mean over the queries of a process, the mask losses are divided by all processes' masks
    "unequal_masks": (PARENT, ("MODEL.MASK_FORMER.CLASS_WEIGHT", 0.0), (3, 1), 1),
    "no_masks_on_one": (ECO, (*ONE_EXIT, "MODEL.MASK_FORMER.CLASS_WEIGHT", 0.0), (3, 0), 1),
    "accumulated": (ECO, ONE_EXIT, (3, 3), 2),
}
STEPS = 3
# Gradients are clipped to a norm of 0.01, hence the large rate: a step moves the weights by 0.01 in all.
SOLVER = [
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.BASE_LR", 1.0),
    *("SOLVER.AMP.ENABLED", False),
]


@contextlib.contextmanager
def same_points() -> Iterator[None]:
    """The same random points for every mask, image and process inside the block."""
    original = torch.rand

    def rand(n, count, two, device=None, dtype=None):
        return original((1, count, two), generator=torch.Generator().manual_seed(count)).expand(n, count, two)

    with mock.patch("torch.rand", rand):
        yield


def train(name: str, folder: Path) -> None:
    config, options, num_masks, accumulation = CASES[name]
    cfg = load_cfg(str(CONFIGS / config), [*MINI, *SOLVER, *options])
    model = fill(build(config, *SOLVER, *options)).train()
    images = make_batch(sizes=((64, 96), (64, 96)))
    for x, n in zip(images, num_masks):
        x["instances"] = x["instances"][:n]
    mine = images[comm.get_rank() :: comm.get_world_size()]
    step = Step(
        distributed(model, unused=trains_some_exits(model)),
        [mine] * STEPS * accumulation,
        build_optimizer(cfg, model),
        precision=autocast(cfg, "cpu", False),
        accumulation_steps=accumulation,
    )
    step.train(0, STEPS)
    draws = [sorted(model.sampler(i)) for i in range(STEPS)] if hasattr(model, "sampler") else []
    record = {"draws": draws, "weights": parent_sha256(model.state_dict())}
    (folder / f"{name}.rank{comm.get_rank()}.json").write_text(json.dumps(record))
    if comm.is_main_process():
        torch.save(model.state_dict(), folder / f"{name}.pth")


def train_whole(args: argparse.Namespace) -> None:
    """The trainer on mapped images, with random points, four images per step in passes of one.

    Only the class loss is on: it is a mean over the queries of a pass. Mask losses divide by all processes' masks.
    """
    losses = [word for name in ("MASK", "DICE") for word in (f"MODEL.MASK_FORMER.{name}_WEIGHT", 0.0)]
    batch = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_GPU", 1, "SOLVER.MAX_ITER", STEPS, "DATALOADER.NUM_WORKERS", 0]
    other = ["SEED", 5, "DATASETS.TEST", (), "MODEL.ECO.EXITS_PER_STEP", 2, "OUTPUT_DIR", str(args.folder / "whole")]
    trainer = Trainer(load_cfg(args.config, [*args.options, *SOLVER, *losses, *batch, *other]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    if comm.is_main_process():
        recorded = {
            name: [v for v, _ in h.values()] for name, h in trainer.storage.histories().items() if "loss" in name
        }
        (args.folder / "losses.json").write_text(json.dumps(recorded))
        torch.save(trainer.checkpointer.model.state_dict(), args.folder / "whole.pth")


def run_evaluation(args: argparse.Namespace) -> None:
    cfg = load_cfg(args.config, [*args.options, "OUTPUT_DIR", str(args.folder)])
    results = evaluate(cfg, build_trained(cfg))
    if comm.is_main_process():
        (args.folder / "results.json").write_text(json.dumps(results))


def main(args: argparse.Namespace) -> None:
    train_whole(args)
    with same_points():
        for name in CASES:
            train(name, args.folder)
        run_evaluation(args)
