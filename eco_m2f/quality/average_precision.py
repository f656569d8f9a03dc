"""COCO's AP of a dataset and of one image, through pycocotools."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.masks import as_text

_AREAS = ("all", "small", "medium", "large")  # the order of pycocotools' area ranges


class ObjectComparison:
    """Compares the objects of one image with the detections of any number of exits.

    objects: COCO's annotations, with category_id, iscrowd, and bbox or segmentation. kind: "bbox" compares boxes,
    "segm" masks.
    """

    def __init__(self, objects: Sequence[Mapping], kind: str, max_detections: int = 100):
        self._categories = sorted({o["category_id"] for o in objects if not o.get("iscrowd", 0)})
        self._kind, self._max_detections = kind, max_detections
        categories = [{"id": c} for c in sorted({o["category_id"] for o in objects})]
        image = {"id": 0, "height": 0, "width": 0}  # unused: run lengths have their own size
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            self._truth = coco_of([image], categories, [_shape(o) for o in objects])

    def ap(self, detections: Sequence[Mapping]) -> float:
        """AP@[.5:.95] of this image alone, in [0, 1]: the mean over the categories of its objects.

        detections: category_id, score, and bbox x y w h or segmentation. As in COCO, detections of categories without
        objects in the image do not count, nor do detections in a crowd of their category. An image without objects
        other than crowds gets 0.
        """
        if not self._categories:
            return 0.0
        wanted = [{**d, "image_id": 0} for d in detections if d["category_id"] in self._categories]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, result_set(self._truth, wanted), self._kind)
            p = evaluation.params
            p.imgIds, p.catIds, p.maxDets = [0], self._categories, [self._max_detections]
            p.areaRng, p.areaRngLbl = p.areaRng[:1], p.areaRngLbl[:1]  # all sizes
            evaluation.evaluate()
            evaluation.accumulate()
        return mean_precision(evaluation.eval["precision"])


def _shape(o: Mapping) -> dict:
    """The object, as one of the image with id 0."""
    area = o["bbox"][2] * o["bbox"][3]
    kept = {k: o[k] for k in ("category_id", "bbox", "segmentation", "area", "iscrowd") if k in o}
    return {"image_id": 0, "iscrowd": 0, "area": area, **kept}


def coco_of(images: Sequence[Mapping], categories: Sequence[Mapping], objects: Sequence[Mapping]) -> COCO:
    """The ground truth for pycocotools. Objects are numbered from 1, because it never finds an object of id 0."""
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
    """COCO's AP over the given images, in percent. detections: in COCO's result format.

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
    """The detections for pycocotools, whose own loader fails on an empty list."""
    if detections:
        return truth.loadRes([dict(d) for d in detections])
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def mean_precision(precision: np.ndarray) -> float:
    """Mean in [0, 1] of the entries that are not -1, pycocotools' mark for missing; NaN if there is none."""
    values = precision[precision > -1]
    return float(values.mean()) if values.size else float("nan")


def _mean(precision: np.ndarray) -> float:
    return 100 * mean_precision(precision)


def encode(mask: np.ndarray) -> dict:
    """Run-length code of a uint8 mask [H, W]. Its counts are text, which JSON can hold."""
    return as_text(rle.encode(np.asfortranarray(mask)))
