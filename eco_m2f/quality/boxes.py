"""The AP of an image's boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .registry import QUALITY_REGISTRY


@dataclass(frozen=True)
class PackedBoxes:
    """Detections on their way to a worker: corners x0 y0 x1 y1, their contiguous classes and scores."""

    corners: np.ndarray  # [N, 4] float64
    classes: list[int]
    scores: list[float]

    @classmethod
    def of(cls, instances) -> "PackedBoxes":
        corners = instances.pred_boxes.tensor.cpu().double().numpy()
        return cls(corners, instances.pred_classes.tolist(), instances.scores.tolist())

    def detections(self, dataset_id: Mapping[int, int]) -> list[dict]:
        """category_id (the dataset's), bbox x y w h, score of each."""
        boxes = np.concatenate([self.corners[:, :2], self.corners[:, 2:] - self.corners[:, :2]], axis=1).tolist()
        return [
            {"category_id": dataset_id[c], "bbox": box, "score": score}
            for box, score, c in zip(boxes, self.scores, self.classes)
        ]


@QUALITY_REGISTRY.register()
class BoxAP:
    """AP@[.5:.95] of an image's boxes; see `ObjectComparison.ap`.

    The AP of a dataset ranks the detections of all images together, so it is no sum over images. The mean over the
    images, AP_image of `BoxEvaluator`, is used instead.
    """

    name = "AP"
    annotation = "boxes"
    files = ()
    category_keys = ()
    columns = {"quality": "mean AP of an image"}
    exact = None
    result_file = "boxes.json"
    evaluated_columns = {"evaluated_ap": "evaluated mean AP", "dataset_ap": "AP of the dataset"}
    switch = ""

    def __init__(self, truth):
        self.truth = truth  # see `BoxGroundTruth`

    @classmethod
    def of(cls, dataset_name: str) -> "BoxAP":
        from .ground_truth import BoxGroundTruth

        return cls(BoxGroundTruth(dataset_name))

    @property
    def categories(self) -> list[dict]:
        return self.truth.categories

    def prepare(self, model, pred: Mapping, images, x: Mapping) -> PackedBoxes:
        """The detections as arrays."""
        return PackedBoxes.of(model.postprocess(pred, images, [x])[0]["instances"])

    def comparison(self, x: Mapping):
        return partial(_compare, self.truth.objects(x["image_id"]), self.truth.dataset_id)

    @staticmethod
    def mirrored(prediction: PackedBoxes, width: int) -> PackedBoxes:
        x0, y0, x1, y1 = prediction.corners.T
        return replace(prediction, corners=np.stack([width - x1, y0, width - x0, y1], axis=1))

    @staticmethod
    def evaluated(content: Mapping) -> dict[str, float]:
        return evaluated_ap(content)


def evaluated_ap(content: Mapping) -> dict[str, float]:
    """Mean AP of the images and AP of the dataset, in points; NaN without objects."""
    values = {"evaluated_ap": content["AP_image"], "dataset_ap": content["AP"]}
    return {column: float("nan") if value is None else 100 * value for column, value in values.items()}


def to_detections(instances, dataset_id: Mapping[int, int]) -> list[dict]:
    """`PackedBoxes.detections` of detectron2's `Instances`."""
    return PackedBoxes.of(instances).detections(dataset_id)


def _compare(
    objects: Sequence[Mapping], dataset_id: Mapping[int, int], predictions: Sequence[PackedBoxes]
) -> list[tuple[float, None]]:
    from .average_precision import ObjectComparison

    most = max((len(packed.scores) for packed in predictions), default=0)  # TEST.DETECTIONS_PER_IMAGE is applied before
    comparison = ObjectComparison(objects, "bbox", max(most, 1))
    return [(comparison.ap(packed.detections(dataset_id)), None) for packed in predictions]
