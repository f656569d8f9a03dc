"""mIoU against the panoptic annotation, or against PNGs of class ids where the dataset has them."""

from collections.abc import Mapping

import numpy as np

from .collect import RowEvaluator
from .ground_truth import PanopticGroundTruth, SemanticGroundTruth


class SemanticEvaluator(RowEvaluator):
    """Reads `sem_seg` [C, H, W] of the outputs, scores of the contiguous classes.

    Truth is the input's `sem_seg_file_name` where the metadata has a `sem_seg_root`, else derived from the panoptic
    annotation. `evaluate` returns {"sem_seg": {mIoU, fwIoU, mACC, pACC, IoU-<class>}} in percent; as in detectron2,
    the means are over the classes that occur in the ground truth and ignored pixels count nowhere.
    """

    def __init__(self, ground_truth: PanopticGroundTruth | SemanticGroundTruth, output_dir: str | None = None):
        self._ground_truth = ground_truth
        self._class_names = ground_truth.class_names
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[np.ndarray, np.ndarray]:
        num_classes, scores = len(self._class_names), y["sem_seg"]
        if scores.shape[0] != num_classes:
            raise ValueError(
                f"sem_seg has {scores.shape[0]} classes, dataset {self._ground_truth.name!r} has {num_classes}: "
                "set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        return _sparse_confusion(self._ground_truth.class_map(x), scores.argmax(dim=0).cpu().numpy(), num_classes)

    def summary(self, rows: dict) -> dict:
        num_classes = len(self._class_names)
        confusion = np.zeros(num_classes**2, dtype=np.int64)
        for cells, counts in rows.values():
            confusion[cells] += counts
        result = semantic_metrics(confusion.reshape(num_classes, num_classes), self._class_names)
        self.write("semantic.json", {k: None if np.isnan(v) else v for k, v in result.items()})
        return {"sem_seg": result}


def semantic_metrics(confusion: np.ndarray, class_names: list[str]) -> dict[str, float]:
    """Percentages from pixel counts [true class, predicted class]; NaN where there is nothing to average."""
    correct, true = np.diag(confusion).astype(float), confusion.sum(axis=1).astype(float)
    union = true + confusion.sum(axis=0) - correct
    present = true > 0
    iou = np.divide(correct, union, out=np.full(len(true), np.nan), where=present)
    recall = np.divide(correct, true, out=np.full(len(true), np.nan), where=present)
    if not present.any():
        means = dict.fromkeys(("mIoU", "fwIoU", "mACC", "pACC"), float("nan"))
    else:
        weight = true[present] / true.sum()
        means = {
            "mIoU": iou[present].mean(),
            "fwIoU": (iou[present] * weight).sum(),
            "mACC": recall[present].mean(),
            "pACC": correct.sum() / true.sum(),
        }
    return {k: 100 * float(v) for k, v in {**means, **{f"IoU-{n}": v for n, v in zip(class_names, iou)}}.items()}


def _sparse_confusion(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The non-zero cells (true * num_classes + predicted) and their pixel counts."""
    if truth.shape != pred.shape:
        raise ValueError(
            f"sem_seg is {pred.shape}, its ground truth {truth.shape}: height and width of the input differ"
        )
    known = truth < num_classes
    counts = np.bincount(truth[known] * num_classes + pred[known], minlength=num_classes**2)
    cells = np.flatnonzero(counts)
    return cells, counts[cells]
