"""Measures Step B on one image: derived at all exits in one pass, against one evaluation per exit.

    python tools/benchmarks/step_b.py --threads 2 --rounds 2 --config-file \\
        configs/coco/panoptic-segmentation/eco/eco_maskformer2_swin_tiny_bs16_50ep.yaml

The per-image PQ of 5 exits is measured too. timing.py says how times are taken.
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
class RandomTruth:
    """Stands in for `PanopticGroundTruth`: Voronoi cells of random categories."""

    ids: np.ndarray
    categories: list[int]
    dataset_id: dict[int, int]

    @classmethod
    def of(cls, size: Sequence[int], num_segments: int, num_classes: int, seed: int) -> "RandomTruth":
        rng = np.random.default_rng(seed)
        sites = rng.uniform(0, 1, (num_segments, 2)) * size
        y, x = np.mgrid[: size[0], : size[1]]
        cells = np.argmin((y - sites[:, 0, None, None]) ** 2 + (x - sites[:, 1, None, None]) ** 2, axis=0)
        return cls(cells + 1, rng.integers(num_classes, size=num_segments).tolist(), {i: i for i in range(num_classes)})

    def image(self, image_id) -> "RandomTruth":
        return self

    def id_map(self) -> np.ndarray:
        return self.ids

    @property
    def segments(self) -> list[dict]:
        return [{"id": i + 1, "category_id": c} for i, c in enumerate(self.categories)]


class InTurn(PanopticQuality):
    """The exits come in their order. Each gets its own score threshold, so that as many queries are in each map."""

    def __init__(self, truth: RandomTruth, whole: WholeModel):
        super().__init__(truth)
        self.whole, self.turn = whole, itertools.cycle(whole.model.exits)

    def prepare(self, model, pred: dict, images, x: dict) -> tuple:
        model.postprocessor = self.whole.postprocessors[next(self.turn)]
        return super().prepare(model, pred, images, x)


@torch.no_grad()
def contestants(cfg, size: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Both ways to the qualities of one random image at all exits."""
    torch.manual_seed(0)
    whole = WholeModel(build_model(cfg).eval(), tuple(size))
    truth = RandomTruth.of(size, 20, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, seed=0)
    x = {"image": whole.image, "image_id": 0, "file_name": "", "height": size[0], "width": size[1]}
    quality, costs = InTurn(truth, whole), ExitCosts(whole.model)

    def separately() -> None:
        for k in whole.model.exits:
            panoptic, segments = whole.segment([k])[0]["panoptic_seg"]
            comparison = PanopticComparison(truth.ids, truth.segments)
            comparison.compare(panoptic.cpu().numpy(), to_dataset_categories(segments, truth.dataset_id))

    def in_one_pass() -> object:
        return predict_exits(whole.model, quality, x, "res5", costs).row()

    return {"one pass": in_one_pass, "one evaluation per exit": separately}


def pq_milliseconds(rounds: int = 20) -> float:
    """Median time of preparing a 640x480 truth and comparing five predictions with it."""
    truth, *predictions = (RandomTruth.of((480, 640), 20, 10, seed) for seed in range(6))

    def once() -> None:
        comparison = PanopticComparison(truth.ids, truth.segments)
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
