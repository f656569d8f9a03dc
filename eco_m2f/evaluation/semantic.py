"""mIoU of a dataset, from the summed pixel counts of its images."""

from collections.abc import Mapping

import numpy as np

from ..quality.ground_truth import ClassMaps
from ..quality.semantic import mean_iou, pixel_statistics
from ..quality.statistics import ImageStatistics, total_statistics
from .collect import RowEvaluator, without_nan


class SemanticEvaluator(RowEvaluator):
    """Reads `sem_seg` [C, H, W] of the outputs, scores of the contiguous classes.

    The ground truth is the PNG of class ids at `sem_seg_file_name` of the input, or else the classes of the panoptic
    annotation. `evaluate` returns {"sem_seg": {mIoU, fwIoU, mACC, pACC, IoU-<class>}} in percent. As in detectron2, the
    means are over the classes in the ground truth, and ignored pixels do not count.
    """

    def __init__(self, ground_truth: ClassMaps, output_dir: str | None = None):
        self._ground_truth = ground_truth
        self._class_names = [c["name"] for c in ground_truth.class_categories]
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> ImageStatistics:
        num_classes, scores = len(self._class_names), y["sem_seg"]
        if scores.shape[0] != num_classes:
            raise ValueError(
                f"sem_seg has {scores.shape[0]} classes, dataset {self._ground_truth.name!r} has {num_classes}: "
                "set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        truth, predicted = self._ground_truth.class_map_reader(x)(), scores.argmax(dim=0).cpu().numpy()
        return pixel_statistics(truth, predicted, np.arange(num_classes))

    def summary(self, rows: dict) -> dict:
        result = semantic_metrics(total_statistics(rows.values()), self._class_names)
        self.write("semantic.json", without_nan(result))
        return {"sem_seg": result}


def semantic_metrics(total: ImageStatistics, class_names: list[str]) -> dict[str, float]:
    """Percentages from the pixel counts of all images by class; NaN if there is nothing to average."""
    tp, fp, fn = (np.zeros(len(class_names)) for _ in range(3))
    for counts, values in ((tp, total.tp), (fp, total.fp), (fn, total.fn)):
        counts[total.category_id] = values
    true = tp + fn  # [C] pixels of each class
    present = true > 0
    iou = np.divide(tp, true + fp, out=np.full(len(true), np.nan), where=present)
    if not present.any():
        means = dict.fromkeys(("mIoU", "fwIoU", "mACC", "pACC"), float("nan"))
    else:
        means = {
            "mIoU": mean_iou(total),
            "fwIoU": (iou * true)[present].sum() / true.sum(),
            "mACC": (tp[present] / true[present]).mean(),
            "pACC": tp.sum() / true.sum(),
        }
    return {k: 100 * float(v) for k, v in {**means, **{f"IoU-{n}": v for n, v in zip(class_names, iou)}}.items()}
