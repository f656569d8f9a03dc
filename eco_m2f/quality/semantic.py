"""The mean IoU of an image's classes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from .postprocessed import on_host, results_of
from .registry import QUALITY_REGISTRY
from .statistics import ImageStatistics


@QUALITY_REGISTRY.register()
class MeanIoU:
    """mIoU of an image: the mean over the classes in its ground truth, without ignored pixels.

    The statistics count pixels, and their sums give the exact mIoU of any choice of exits. The ground truth is the
    record's class map, or else the classes of its panoptic annotation. An image without labelled pixels has quality 0.
    """

    name = "mIoU"
    annotation = "panoptic"
    files = ("sem_seg_file_name", "pan_seg_file_name")
    category_keys = ()
    columns = {"miou": "mIoU"}
    result_file = "semantic.json"
    evaluated_columns = {"evaluated_miou": "evaluated mIoU"}
    switch = "MODEL.MASK_FORMER.TEST.SEMANTIC_ON"

    def __init__(self, truth):
        self.truth = truth  # see `ClassMaps`

    @classmethod
    def of(cls, dataset_name: str) -> "MeanIoU":
        from .ground_truth import class_maps_of

        return cls(class_maps_of(dataset_name))

    @property
    def categories(self) -> list[dict]:
        return self.truth.class_categories

    def prepare(self, model, pred: Mapping, images, x: Mapping) -> np.ndarray:
        """[H, W] contiguous classes of highest score."""
        only = {"semantic_on": True, "instance_on": False, "panoptic_on": False}
        scores = results_of(model, pred, images, x, **only)["sem_seg"]  # [C, H, W]
        return on_host(scores.argmax(dim=0), len(scores) - 1)

    def comparison(self, x: Mapping):
        ids = np.array([c["id"] for c in self.categories])
        return partial(self._compare, self.truth.class_map_reader(x), ids)

    @staticmethod
    def mirrored(prediction: np.ndarray, width: int) -> np.ndarray:
        return np.ascontiguousarray(prediction[:, ::-1])

    @classmethod
    def _compare(
        cls, read: Callable[[], np.ndarray], ids: np.ndarray, predictions: Sequence[np.ndarray]
    ) -> list[tuple[float, ImageStatistics]]:
        truth = read()
        found = [pixel_statistics(truth, classes, ids) for classes in predictions]
        return [(cls.of_image(statistics), statistics) for statistics in found]

    @staticmethod
    def of_image(statistics: ImageStatistics) -> float:
        """mIoU in [0, 1]; 0.0 if no pixel is labelled."""
        return float(np.nan_to_num(mean_iou(statistics)))

    @staticmethod
    def exact(total: ImageStatistics, categories: Sequence[Mapping]) -> dict[str, float]:
        return {"miou": mean_iou(total)}

    @staticmethod
    def exact_each(ids: np.ndarray, sums: np.ndarray, categories: Sequence[Mapping]) -> dict[str, np.ndarray]:
        _, tp, fp, fn = np.moveaxis(sums, 1, 0)  # [R, C] each
        occurs = tp + fn > 0
        iou = np.divide(tp, tp + fp + fn, out=np.zeros_like(tp), where=occurs)
        number = np.count_nonzero(occurs, axis=1)
        return {"miou": np.divide(iou.sum(axis=1), number, out=np.full(len(sums), np.nan), where=number > 0)}

    @staticmethod
    def evaluated(content: Mapping) -> dict[str, float]:
        value = content["mIoU"]  # in points; None if no pixel is labelled
        return {"evaluated_miou": float("nan") if value is None else value}


def mean_iou(statistics: ImageStatistics) -> float:
    """mIoU in [0, 1] over the classes in the ground truth; NaN if there is none."""
    occurs = statistics.tp + statistics.fn > 0
    iou = statistics.tp[occurs] / (statistics.tp + statistics.fp + statistics.fn)[occurs]
    return float(iou.mean()) if len(iou) else float("nan")


def pixel_statistics(truth: np.ndarray, predicted: np.ndarray, ids: np.ndarray) -> ImageStatistics:
    """Counts each class's pixels: found (tp), claimed in error (fp) and missed (fn). `iou` is 0 and not used.

    truth, predicted: [H, W] contiguous classes; truth of len(ids) and above is ignored. ids [C]: the categories of
    the classes, in any order. Raises ValueError for different sizes.
    """
    if truth.shape != predicted.shape:
        raise ValueError(
            f"sem_seg is {predicted.shape}, but its ground truth is {truth.shape}: correct height and width"
        )
    labelled = truth < len(ids)
    truth, predicted = truth[labelled], predicted[labelled]

    def count(classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes, minlength=len(ids))  # [C]

    tp = count(truth[truth == predicted])
    fp, fn = count(predicted) - tp, count(truth) - tp
    counted = np.flatnonzero(tp + fp + fn)
    counted = counted[np.argsort(ids[counted])]
    return ImageStatistics(ids[counted], np.zeros(len(counted)), tp[counted], fp[counted], fn[counted])
