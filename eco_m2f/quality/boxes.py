"""The AP of an image's boxes."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from .registry import QUALITY_REGISTRY


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

    def prepare(self, model, pred: Mapping, images, x: Mapping):
        """The detections as `Instances`."""
        return model.postprocess(pred, images, [x])[0]["instances"].to("cpu")

    def comparison(self, x: Mapping):
        return partial(_compare, self.truth.objects(x["image_id"]), self.truth.dataset_id)

    @staticmethod
    def evaluated(content: Mapping) -> dict[str, float]:
        return evaluated_ap(content)


def evaluated_ap(content: Mapping) -> dict[str, float]:
    """Mean AP of the images and AP of the dataset, in points; NaN without objects."""
    values = {"evaluated_ap": content["AP_image"], "dataset_ap": content["AP"]}
    return {column: float("nan") if value is None else 100 * value for column, value in values.items()}


def to_detections(instances, dataset_id: Mapping[int, int]) -> list[dict]:
    """The dataset's category_id, bbox x y w h and score of each instance."""
    corners = instances.pred_boxes.tensor.cpu().double().numpy()  # [N, 4]
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()  # [N, 4] x y w h
    return [
        {"category_id": dataset_id[c], "bbox": box, "score": score}
        for box, score, c in zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist())
    ]


def _compare(
    objects: Sequence[Mapping], dataset_id: Mapping[int, int], predictions: Sequence
) -> list[tuple[float, None]]:
    from .average_precision import ObjectComparison

    most = max(
        (len(instances) for instances in predictions), default=0
    )  # the model has applied TEST.DETECTIONS_PER_IMAGE
    comparison = ObjectComparison(objects, "bbox", max(most, 1))
    return [(comparison.ap(to_detections(instances, dataset_id)), None) for instances in predictions]
