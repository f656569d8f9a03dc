"""Mask AP by COCO's definition, through pycocotools."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .collect import RowEvaluator
from .ground_truth import PanopticGroundTruth

_AREAS = ("all", "small", "medium", "large")  # the order of pycocotools' area ranges


class InstanceEvaluator(RowEvaluator):
    """Reads `instances` of the outputs: pred_masks [N, H, W], scores, pred_classes (contiguous).

    Truth is the metadata's `json_file` (COCO instances) where that names a file, else the thing segments of the
    panoptic annotation. `evaluate` returns {"segm": {AP, AP50, AP75, APs, APm, APl, AP-<class>}} in percent, NaN where
    no object of that kind exists. `max_detections` is COCO's limit per image and class; 100 is the official one.
    """

    def __init__(self, ground_truth: PanopticGroundTruth, output_dir: str | None = None, max_detections: int = 100):
        self._ground_truth = ground_truth
        self._max_detections = max_detections
        json_file = getattr(ground_truth.metadata, "json_file", None)
        if json_file and not Path(json_file).is_file():
            raise ValueError(
                f"{json_file}, the instances of {ground_truth.name!r}, does not exist: see datasets/README.md"
            )
        self._json_file = json_file
        self._things = [c for c in ground_truth.categories if c["isthing"]]
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[list[dict], tuple | None]:
        detections = self._detections(x["image_id"], y["instances"])
        return detections, None if self._json_file else self._truth(x["image_id"])

    def summary(self, rows: dict) -> dict:
        detections = [d for found, _ in rows.values() for d in found]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = COCO(self._json_file) if self._json_file else self._coco([t for _, t in rows.values()])
            result = average_precision(truth, detections, list(rows), self._max_detections)
        self.write("instances_predictions.json", detections)
        return {"segm": result}

    def _detections(self, image_id, instances) -> list[dict]:
        masks = instances.pred_masks.to("cpu", torch.uint8).numpy()
        return [
            {
                "image_id": image_id,
                "category_id": self._ground_truth.dataset_id[int(c)],
                "segmentation": _encode(m),
                "score": float(s),
            }
            for m, s, c in zip(masks, instances.scores.tolist(), instances.pred_classes.tolist())
        ]

    def _truth(self, image_id) -> tuple[dict, list[dict]]:
        """COCO's image entry, and its instance annotations: the thing segments of the panoptic annotation."""
        id_map = self._ground_truth.id_map(image_id)
        things = {c["id"] for c in self._things}
        objects = []
        for segment in self._ground_truth.segments(image_id):
            if segment["category_id"] in things:
                mask = (id_map == segment["id"]).astype(np.uint8)
                kept = {"category_id": segment["category_id"], "iscrowd": int(segment.get("iscrowd", 0))}
                code = _encode(mask)
                shape = {"segmentation": code, "bbox": rle.toBbox(code).tolist(), "area": int(mask.sum())}
                objects.append({"image_id": image_id, **kept, **shape})
        return {"id": image_id, "height": id_map.shape[0], "width": id_map.shape[1]}, objects

    def _coco(self, truths: list[tuple[dict, list[dict]]]) -> COCO:
        coco = COCO()
        objects = [o for _, row in truths for o in row]
        coco.dataset = {
            "images": [image for image, _ in truths],
            "categories": self._things,
            "annotations": [{**o, "id": n} for n, o in enumerate(objects, start=1)],
        }
        coco.createIndex()
        return coco


def average_precision(
    truth: COCO, detections: list[dict], image_ids: list, max_detections: int = 100, kind: str = "segm"
) -> dict[str, float]:
    """COCO's AP, in percent, over the given images; detections are in COCO's result format.

    kind: "segm" compares masks, "bbox" boxes.
    """
    evaluation = COCOeval(truth, result_set(truth, detections), kind)
    evaluation.params.imgIds = list(image_ids)
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # [IoU threshold, recall, category, area range]
    iou = evaluation.params.iouThrs
    result = {"AP": _mean(precision[..., 0])}
    for threshold in (0.5, 0.75):
        result[f"AP{round(100 * threshold)}"] = _mean(precision[np.isclose(iou, threshold), ..., 0])
    for i, area in enumerate(_AREAS[1:], start=1):
        result[f"AP{area[0]}"] = _mean(precision[..., i])
    for k, category in enumerate(truth.loadCats(evaluation.params.catIds)):
        result[f"AP-{category['name']}"] = _mean(precision[:, :, k, 0])
    return result


def result_set(truth: COCO, detections: list[dict]) -> COCO:
    """The detections as pycocotools wants them; its own loader fails on an empty list."""
    if detections:
        return truth.loadRes([dict(d) for d in detections])
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def mean_precision(precision: np.ndarray) -> float:
    """Mean of the entries that exist, in [0, 1]; pycocotools marks the others with -1."""
    values = precision[precision > -1]
    return float(values.mean()) if values.size else float("nan")


def _mean(precision: np.ndarray) -> float:
    return 100 * mean_precision(precision)


def _encode(mask: np.ndarray) -> dict:
    """Run-length code of a uint8 mask, its counts as text so that it can be written as JSON."""
    code = rle.encode(np.asfortranarray(mask))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}
