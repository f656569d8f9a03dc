"""Mask AP by COCO's definition, through pycocotools."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.annotations import read
from ..data.categories import check_same_categories
from ..data.masks import as_text, run_lengths
from ..data.panoptic_map import DataError
from ..data.schema import INSTANCES
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
        self._things = [c for c in ground_truth.categories if c["isthing"]]
        json_file = getattr(ground_truth.metadata, "json_file", None)
        self._given = GivenInstances(json_file, self._things) if json_file else None
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[list[dict], tuple]:
        size = tuple(y["instances"].pred_masks.shape[-2:])
        objects = self._given.objects(x["image_id"], size) if self._given else self._truth(x["image_id"])
        image = {"id": x["image_id"], "height": size[0], "width": size[1]}
        return self._detections(x["image_id"], y["instances"]), (image, objects)

    def summary(self, rows: dict) -> dict:
        detections = [d for found, _ in rows.values() for d in found]
        images = [image for _, (image, _) in rows.values()]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = coco_of(images, self._things, [o for _, (_, objects) in rows.values() for o in objects])
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

    def _truth(self, image_id) -> list[dict]:
        """COCO's instance annotations of an image: the thing segments of the panoptic annotation."""
        id_map = self._ground_truth.id_map(image_id)
        things = {c["id"] for c in self._things}
        objects = []
        for segment in self._ground_truth.segments(image_id):
            if segment["category_id"] in things:
                code = _encode((id_map == segment["id"]).astype(np.uint8))
                objects.append(_object(image_id, segment["category_id"], segment["iscrowd"], code))
        return objects


class GivenInstances:
    """The objects of an instance JSON. Raises ValueError where it is wrong, or its categories are not the things."""

    def __init__(self, json_file: str, things: Sequence[Mapping]):
        self._json_file = json_file
        content = read(json_file, INSTANCES)
        categories = [c.as_dict() for c in content.categories]
        check_same_categories(things, categories, "the things of the panoptic annotation", json_file)
        self._objects: dict = {image.id: [] for image in content.images}
        for annotation in content.annotations:
            self._objects[annotation.image_id].append(annotation)

    def objects(self, image_id, size: tuple[int, int]) -> list[dict]:
        """COCO's annotations of an image of this (height, width). Raises ValueError for an image that is not listed.

        The area, which only decides whether an object counts as small, is the JSON's unless the mask contradicts it.
        """
        if image_id not in self._objects:
            raise ValueError(f"{self._json_file}: image {image_id!r} is not in `images`; add it, with its objects")
        objects = []
        for o in self._objects[image_id]:
            try:
                code = run_lengths(o.segmentation, size)
            except ValueError as error:
                raise DataError(f"{self._json_file}: an object of image {image_id!r} has {error}") from error
            made = _object(image_id, o.category_id, int(o.iscrowd or 0), code)
            believed = o.area is not None and made["area"] / 2 <= o.area <= made["area"] * 2
            objects.append({**made, "area": o.area if believed else made["area"]})
        return objects


def _object(image_id, category_id: int, iscrowd: int, code: dict) -> dict:
    shape = {"segmentation": code, "bbox": rle.toBbox(code).tolist(), "area": int(rle.area(code))}
    return {"image_id": image_id, "category_id": category_id, "iscrowd": iscrowd, **shape}


def coco_of(images: Sequence[Mapping], categories: Sequence[Mapping], objects: Sequence[Mapping]) -> COCO:
    """An annotation for pycocotools. Objects are numbered from 1: to it, an object of id 0 is never found."""
    coco = COCO()
    coco.dataset = {
        "images": list(images),
        "categories": list(categories),
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
    return as_text(rle.encode(np.asfortranarray(mask)))
