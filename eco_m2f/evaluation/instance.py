"""Mask AP by COCO's definition, through pycocotools."""

import contextlib
import io
from collections.abc import Mapping

import numpy as np
import torch

from ..quality.average_precision import ObjectComparison, average_precision, coco_of, encode
from ..quality.ground_truth import PanopticGroundTruth
from ..quality.instance_ground_truth import InstanceGroundTruth
from .collect import RowEvaluator, without_nan


class InstanceEvaluator(RowEvaluator):
    """Reads `instances` of the outputs: pred_masks [N, H, W], scores, pred_classes (contiguous).

    The ground truth is `InstanceGroundTruth`. `evaluate` returns {"segm": {AP, AP50, AP75, APs, APm, APl, AP_image,
    AP-<class>}} in percent, NaN if no object of that kind exists. AP_image is the mean of `ObjectComparison.ap` over
    the images. With an output_dir it also writes `instances.json`, with the AP of each image. `max_detections` is
    COCO's limit per image and class, officially 100.
    """

    def __init__(self, ground_truth: PanopticGroundTruth, output_dir: str | None = None, max_detections: int = 100):
        self._ground_truth = InstanceGroundTruth(ground_truth)
        self._max_detections = max_detections
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[list[dict], tuple, float]:
        size = tuple(y["instances"].pred_masks.shape[-2:])
        objects = self._ground_truth.image(x["image_id"]).objects(size)
        image = {"id": x["image_id"], "height": size[0], "width": size[1]}
        detections = self._detections(x["image_id"], y["instances"])
        return detections, (image, objects), ObjectComparison(objects, "segm", self._max_detections).ap(detections)

    def summary(self, rows: dict) -> dict:
        detections = [d for found, _, _ in rows.values() for d in found]
        images = [image for _, (image, _), _ in rows.values()]
        objects = [o for _, (_, objects), _ in rows.values() for o in objects]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = coco_of(images, self._ground_truth.things, objects)
            result = average_precision(truth, detections, list(rows), self._max_detections)
        result, content = with_image_ap(result, {image_id: ap for image_id, (*_, ap) in rows.items()})
        self.write("instances.json", content)
        self.write("instances_predictions.json", detections)
        return {"segm": result}

    def _detections(self, image_id, instances) -> list[dict]:
        masks = instances.pred_masks.to("cpu", torch.uint8).numpy()
        return [
            {
                "image_id": image_id,
                "category_id": self._ground_truth.panoptic.dataset_id[int(c)],
                "segmentation": encode(m),
                "score": float(s),
            }
            for m, s, c in zip(masks, instances.scores.tolist(), instances.pred_classes.tolist())
        ]


def with_image_ap(result: Mapping[str, float], per_image: Mapping) -> tuple[dict, dict]:
    """Adds AP_image, the mean AP of the images, to a dataset's AP in percent. per_image: {image id: AP in [0, 1]}.

    Returns the metrics in percent, and the content of the JSON file, which is in [0, 1].
    """
    mean = float(np.mean(list(per_image.values()))) if per_image else float("nan")
    result = {**result, "AP_image": 100 * mean}
    fractions = without_nan({key: value / 100 for key, value in result.items()})
    return result, {**fractions, "per_image_ap": {str(image_id): ap for image_id, ap in per_image.items()}}
