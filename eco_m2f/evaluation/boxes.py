"""Box AP of a dataset by COCO's definition, through pycocotools."""

import contextlib
import io
from collections.abc import Mapping

from pycocotools.coco import COCO

from ..quality.average_precision import ObjectComparison, average_precision, coco_of
from ..quality.boxes import to_detections
from ..quality.ground_truth import BoxGroundTruth
from .collect import RowEvaluator
from .instance import with_image_ap


class BoxEvaluator(RowEvaluator):
    """Reads `instances` of the outputs: pred_boxes (pixels), scores, pred_classes (contiguous).

    `evaluate` returns {"bbox": {AP, AP50, AP75, APs, APm, APl, AP_image, AP-<class>}} in percent, NaN if no object of
    that kind exists. AP_image is the mean of `ObjectComparison.ap` over the images. With an output_dir it also writes
    `boxes.json`, with the AP of each image. `max_detections` is COCO's limit per image and class, officially 100.
    """

    def __init__(self, ground_truth: BoxGroundTruth, output_dir: str | None = None, max_detections: int = 100):
        self._ground_truth = ground_truth
        self._max_detections = max_detections
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[list[dict], float]:
        found = to_detections(y["instances"], self._ground_truth.dataset_id)
        objects = self._ground_truth.objects(x["image_id"])
        ap = ObjectComparison(objects, "bbox", self._max_detections).ap(found)
        return [{"image_id": x["image_id"], **d} for d in found], ap

    def summary(self, rows: dict) -> dict:
        detections = [d for found, _ in rows.values() for d in found]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = boxes_of(self._ground_truth)
            result = average_precision(truth, detections, list(rows), self._max_detections, "bbox")
        result, content = with_image_ap(result, {image_id: ap for image_id, (_, ap) in rows.items()})
        self.write("boxes.json", content)
        self.write("boxes_predictions.json", detections)
        return {"bbox": result}


def boxes_of(truth: BoxGroundTruth) -> COCO:
    """All images and objects of a dataset, for pycocotools."""
    images = truth.image_ids()
    objects = [{"image_id": i, **o} for i in images for o in truth.objects(i)]
    return coco_of([{"id": i} for i in images], truth.categories, objects)
