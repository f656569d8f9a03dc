"""Measures Step B on one image: all exits in one pass, compared with one evaluation per exit.

    python tools/benchmarks/step_b.py --threads 2 --rounds 2 --config-file \\
        configs/coco/panoptic-segmentation/eco/eco_maskformer2_swin_tiny_bs16_50ep.yaml

The PQ of one image at 5 exits is measured too. timing.py describes the timing.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import timing
import torch
from model import PANOPTIC_ALONE, WholeModel

from eco_m2f.costs import ExitCosts
from eco_m2f.engine.command_line import run
from eco_m2f.engine.derive import predict_exits
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.quality import PanopticQuality
from eco_m2f.quality.panoptic_quality import PanopticComparison, to_dataset_categories


@dataclass
class RandomGroundTruth:
    """Replaces `PanopticGroundTruth` by Voronoi cells of random categories."""

    ids: np.ndarray
    categories: list[int]
    dataset_id: dict[int, int]

    @classmethod
    def of(cls, size: Sequence[int], num_segments: int, num_classes: int, seed: int) -> "RandomGroundTruth":
        rng = np.random.default_rng(seed)
        sites = rng.uniform(0, 1, (num_segments, 2)) * size
        y, x = np.mgrid[: size[0], : size[1]]
        cells = np.argmin((y - sites[:, 0, None, None]) ** 2 + (x - sites[:, 1, None, None]) ** 2, axis=0)
        return cls(cells + 1, rng.integers(num_classes, size=num_segments).tolist(), {i: i for i in range(num_classes)})

    def image(self, image_id) -> "RandomGroundTruth":
        return self

    def id_map(self) -> np.ndarray:
        return self.ids

    @property
    def segments(self) -> list[dict]:
        return [{"id": i + 1, "category_id": c} for i, c in enumerate(self.categories)]


class InTurn(PanopticQuality):
    """Gives each exit, in their order, its own score threshold, so all maps have the same number of queries."""

    def __init__(self, ground_truth: RandomGroundTruth, whole: WholeModel):
        super().__init__(ground_truth)
        self.whole, self.turn = whole, itertools.cycle(whole.model.exits)

    def prepare(self, model, pred: dict, images, x: dict) -> tuple:
        model.postprocessor = self.whole.postprocessors[next(self.turn)]
        return super().prepare(model, pred, images, x)


@torch.no_grad()
def contestants(cfg, size: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Two ways to compute the qualities of one random image at all exits."""
    torch.manual_seed(0)
    whole = WholeModel(build_model(cfg).eval(), tuple(size))
    ground_truth = RandomGroundTruth.of(size, 20, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, seed=0)
    x = {"image": whole.image, "image_id": 0, "file_name": "", "height": size[0], "width": size[1]}
    quality, costs = InTurn(ground_truth, whole), ExitCosts(whole.model)

    def separately() -> None:
        for k in whole.model.exits:
            panoptic, segments = whole.segment([k])[0]["panoptic_seg"]
            comparison = PanopticComparison(ground_truth.ids, ground_truth.segments)
            comparison.compare(panoptic.cpu().numpy(), to_dataset_categories(segments, ground_truth.dataset_id))

    def in_one_pass() -> object:
        return predict_exits(whole.model, quality, x, "res5", costs).row()

    return {"one pass": in_one_pass, "one evaluation per exit": separately}


def pq_milliseconds(rounds: int = 20) -> float:
    """The median time to prepare a ground truth of 640x480 and compare five predictions with it."""
    ground_truth, *predictions = (RandomGroundTruth.of((480, 640), 20, 10, seed) for seed in range(6))

    def once() -> None:
        comparison = PanopticComparison(ground_truth.ids, ground_truth.segments)
        for other in predictions:
            comparison.compare(other.ids, other.segments)

    return statistics.median(timing.timed(once, "cpu")[0] for _ in range(rounds))


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=3)
    timing.add_model_options(parser, "an EcoMaskFormer", [800, 1216])
    return parser


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    timing.keep_freed_memory(args.device)
    overlap = ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0)
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", args.device, *PANOPTIC_ALONE, *overlap])
    rows = timing.measure(contestants(cfg, args.size), args.rounds, args.device)
    setting = {**timing.model_setting(args), "exits": len(cfg.MODEL.ECO.EXITS)}
    timing.save(args, [{**setting, **row} for row in rows])
    print("\n".join(map(timing.as_line, rows)))
    print(f"PQ of one 640x480 image at 5 exits, 20 segments: {pq_milliseconds():.2f} ms")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
