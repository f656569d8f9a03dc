"""PQ, SQ and RQ of a dataset, from the summed statistics of its images."""

from collections.abc import Mapping

import numpy as np
import torch

from ..quality.ground_truth import PanopticGroundTruth
from ..quality.panoptic import PanopticQuality
from ..quality.panoptic_quality import dataset_pq, image_pq
from ..quality.statistics import ImageStatistics, total_statistics
from .collect import RowEvaluator, without_nan


class PanopticEvaluator(RowEvaluator):
    """Reads `panoptic_seg` of the outputs: (map [H, W] with 0 for void, segments with contiguous category ids).

    `evaluate` returns {"panoptic_seg": {PQ, SQ, RQ, PQ_th, ..., RQ_st}} in percent, equal to panopticapi's. A dataset
    without things or without stuff has no such entries. With an output_dir it also writes `panoptic.json`: the same,
    the classes by name, and the PQ of each image.
    """

    def __init__(self, ground_truth: PanopticGroundTruth, output_dir: str | None = None):
        self._ground_truth = ground_truth
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> ImageStatistics:
        pred_map, segments = y["panoptic_seg"]
        pred_map = pred_map.cpu().numpy() if torch.is_tensor(pred_map) else np.asarray(pred_map)
        [(_, statistics)] = PanopticQuality(self._ground_truth).comparison(x)([(pred_map, segments)])
        return statistics

    def summary(self, rows: dict) -> dict:
        self._ground_truth.warn_if_partial(len(rows))
        result = dataset_pq(total_statistics(rows.values()), self._ground_truth.categories)
        self._write(result, rows)
        groups = {"All": "", "Things": "_th", "Stuff": "_st"}
        return {
            "panoptic_seg": {
                f"{key.upper()}{suffix}": 100 * result[group][key]
                for group, suffix in groups.items()
                for key in ("pq", "sq", "rq")
                if result[group]["n"]
            }
        }

    def _write(self, result: dict, rows: dict) -> None:
        name = {c["id"]: c.get("name", str(c["id"])) for c in self._ground_truth.categories}
        groups = {g: without_nan(result[g]) for g in ("All", "Things", "Stuff")}
        per_class = {name[c]: row for c, row in result["per_class"].items()}
        per_image = {str(image_id): image_pq(row) for image_id, row in rows.items()}
        self.write("panoptic.json", {**groups, "per_class": per_class, "per_image_pq": per_image})
