"""The mean IoU of an image's classes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from .postprocessed import results_of
from .registry import QUALITY_REGISTRY
from .statistics import ImageStatistics


@QUALITY_REGISTRY.register()
class MeanIoU:
    """mIoU of an image: the mean over the classes that occur in its ground truth, ignored pixels left out.

    The statistics count pixels, and their sums make the mIoU of any choice of exits exact. The ground truth is the
    record's class map, or else the classes of its panoptic annotation. An image without a labelled pixel has quality 0
    at every exit.
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
        """[H, W] contiguous classes, as an evaluation takes them from `sem_seg`."""
        only = {"semantic_on": True, "instance_on": False, "panoptic_on": False}
        scores = results_of(model, pred, images, x, **only)["sem_seg"]  # [C, H, W]
        return scores.argmax(dim=0).to(torch.uint8 if len(scores) <= 256 else torch.int32).cpu().numpy()

    def comparison(self, x: Mapping):
        ids = np.array([c["id"] for c in self.categories])
        return partial(self._compare, self.truth.class_map_reader(x), ids)

    @classmethod
    def _compare(
        cls, read: Callable[[], np.ndarray], ids: np.ndarray, predictions: Sequence[np.ndarray]
    ) -> list[tuple[float, ImageStatistics]]:
        truth = read()
        found = [pixel_statistics(truth, classes, ids) for classes in predictions]
        return [(cls.of_image(statistics), statistics) for statistics in found]

    @staticmethod
    def of_image(statistics: ImageStatistics) -> float:
        """mIoU in [0, 1]; 0.0 where no pixel is labelled."""
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
        value = content["mIoU"]  # in points; None where nothing is labelled
        return {"evaluated_miou": float("nan") if value is None else value}


def mean_iou(statistics: ImageStatistics) -> float:
    """In [0, 1], over the classes that occur in the ground truth; NaN where there is none."""
    occurs = statistics.tp + statistics.fn > 0
    iou = statistics.tp[occurs] / (statistics.tp + statistics.fp + statistics.fn)[occurs]
    return float(iou.mean()) if len(iou) else float("nan")


def pixel_statistics(truth: np.ndarray, predicted: np.ndarray, ids: np.ndarray) -> ImageStatistics:
    """Pixels of each class that are found, claimed in error and missed; their iou is 0, which nothing reads.

    truth, predicted: [H, W] contiguous classes; truth of len(ids) and above is ignored. ids [C]: the categories of
    the classes, in increasing order or not. Raises ValueError for different sizes.
    """
    if truth.shape != predicted.shape:
        raise ValueError(
            f"sem_seg is {predicted.shape}, its ground truth {truth.shape}: height and width of the input differ"
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
