"""Cityscapes' own AP of instances, as https://www.cityscapes-dataset.com/benchmarks defines it.

AP is the mean over the 8 things and over IoU thresholds .5, .55 ... .95. It differs from COCO's AP:

- Objects below 100 pixels, groups (regions of several objects) and void are ignored. They need not be found, and a
  prediction on them is no mistake.
- The number of detections has no limit.
- An object is found once. Each further prediction on it is a mistake.
- The curve of precision over recall is not made monotonous.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.images import DataError, open_image
from ..quality.ground_truth import PanopticGroundTruth
from .collect import RowEvaluator, without_nan

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # written as in the benchmark, with the same rounding
MIN_PIXELS = 100
INSTANCES = 1000  # from here on an id is label * 1000 + number; below it is the label of stuff, a group or void
SUFFIX = "_gtFine_instanceIds.png"
ADVICE = "unpack gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com as datasets/README.md shows"


@dataclass(frozen=True)
class Prediction:
    """A predicted object: its label, and its pixels on void and on each id of the ground truth."""

    label: int
    score: float
    pixels: int
    void: int
    on: Mapping[int, int]


@dataclass(frozen=True)
class ImageInstances:
    """The image row of the evaluator: {id: pixels} of the ground truth, and the predictions."""

    annotated: Mapping[int, int]
    predictions: Sequence[Prediction]


class CityscapesInstances:
    """The *_gtFine_instanceIds.png of a registered Cityscapes panoptic dataset, and its classes.

    The panoptic PNGs cannot be used: numbered caravans and trailers are void in them, but not for this metric. Raises
    ValueError if files are missing.
    """

    def __init__(self, ground_truth: PanopticGroundTruth):
        metadata = ground_truth.metadata
        self._folder = Path(metadata.gt_dir)
        contiguous = metadata.thing_dataset_id_to_contiguous_id
        self.label_of = {i: label for label, i in contiguous.items()}
        self.names = {label: metadata.thing_classes[i] for label, i in contiguous.items()}
        self.evaluated = {*contiguous, *metadata.stuff_dataset_id_to_contiguous_id}
        missing = [path for path in map(self.path, ground_truth.image_ids()) if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing ({len(missing)} file(s) in all), but AP needs it: {ADVICE}")

    def path(self, image_id: str) -> Path:
        """The file of an image with the id <city>_<sequence>_<frame>."""
        return self._folder / image_id.split("_")[0] / f"{image_id}{SUFFIX}"

    def ids(self, image_id: str) -> np.ndarray:
        """[H, W] int64. Raises ValueError if the file cannot be read or is not a map of ids."""
        path = self.path(image_id)
        try:
            ids = np.asarray(open_image(path, "PNG of instance ids", ("PNG",)).image)
        except DataError as error:
            raise ValueError(f"{error}; {ADVICE}") from error
        if ids.ndim != 2:
            raise ValueError(f"{path}: expected one channel of 16 bits, got shape {ids.shape}: {ADVICE}")
        return ids.astype(np.int64)

    def compare(self, ids: np.ndarray, masks: np.ndarray, labels: Iterable[int], scores: Iterable[float]):
        """The `ImageInstances` of ids [H, W] and predicted masks (bool [N, H, W]) with labels and scores."""
        values, index, counts = np.unique(ids, return_inverse=True, return_counts=True)
        index = index.reshape(ids.shape)
        is_void = np.array([v < INSTANCES and v not in self.evaluated for v in values.tolist()])
        predictions = []
        for mask, label, score in zip(masks, labels, scores):
            on = np.bincount(index[mask], minlength=len(values))
            if on.any():
                hit = {int(values[i]): int(on[i]) for i in np.flatnonzero(on)}
                predictions.append(Prediction(label, score, int(on.sum()), int(on[is_void].sum()), hit))
        return ImageInstances(dict(zip(values.tolist(), counts.tolist())), predictions)


class CityscapesInstanceEvaluator(RowEvaluator):
    """Reads `instances` of the outputs: pred_masks [N, H, W], scores, pred_classes (contiguous).

    `evaluate` returns {"segm": {AP, AP50, AP-<class>}} in percent, NaN for a class without objects. With an output_dir
    it writes the same to `instances.json`.
    """

    def __init__(self, ground_truth: CityscapesInstances, output_dir: str | None = None):
        self._ground_truth = ground_truth
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> ImageInstances:
        truth, found = self._ground_truth, y["instances"].to("cpu")
        ids = truth.ids(x["image_id"])
        masks = found.pred_masks.to(torch.bool).numpy()
        if masks.shape[1:] != ids.shape:
            raise ValueError(
                f"{truth.path(x['image_id'])} is {ids.shape}, but the predicted masks are {masks.shape[1:]}"
            )
        kept = [i for i, c in enumerate(found.pred_classes.tolist()) if c in truth.label_of]  # only things
        labels = [truth.label_of[int(found.pred_classes[i])] for i in kept]
        return truth.compare(ids, masks[kept], labels, [float(found.scores[i]) for i in kept])

    def summary(self, rows: Mapping[str, ImageInstances]) -> dict:
        names = self._ground_truth.names
        table = np.array([[average_precision(rows.values(), c, t) for t in THRESHOLDS] for c in names])
        result = {"AP": _mean(table), "AP50": _mean(table[:, 0])}
        result |= {f"AP-{name}": _mean(row) for name, row in zip(names.values(), table)}
        self.write("instances.json", without_nan(result))
        return {"segm": result}


def average_precision(images: Iterable[ImageInstances], label: int, threshold: float) -> float:
    """AP of a label at an IoU threshold, in [0, 1]; NaN if no image has an object of it that counts."""
    hits, scores, missed, wanted = [], [], 0, 0
    for image in images:
        objects = [(i, n) for i, n in image.annotated.items() if i // INSTANCES == label and n >= MIN_PIXELS]
        predictions = [p for p in image.predictions if p.label == label]
        wanted += len(objects)
        for i, pixels in objects:
            found = sorted((p.score for p in predictions if _iou(p, i, pixels) > threshold), reverse=True)
            hits += [j == 0 for j in range(len(found))]  # the highest score is right, the others are mistakes
            scores += found
            missed += not found
        mistakes = [p.score for p in predictions if _is_mistake(p, image.annotated, threshold)]
        hits += [False] * len(mistakes)
        scores += mistakes
    if not wanted:
        return float("nan")
    return _area(np.array(hits, dtype=bool), np.array(scores), missed) if scores else 0.0


def _iou(prediction: Prediction, i: int, pixels: int) -> float:
    common = prediction.on.get(i, 0)
    return common / (pixels + prediction.pixels - common)


def _is_mistake(prediction: Prediction, annotated: Mapping[int, int], threshold: float) -> bool:
    """Whether a prediction is on no object, and not mostly on ignored pixels: void, groups, small objects."""
    ignored = prediction.void
    for i, common in prediction.on.items():
        if prediction.label not in (i, i // INSTANCES):
            continue
        if _iou(prediction, i, annotated[i]) > threshold:
            return False
        is_group, is_small = i < INSTANCES, annotated[i] < MIN_PIXELS
        ignored += common * (is_group + is_small)  # a small group counts twice, as in the benchmark
    return ignored / prediction.pixels <= threshold


def _area(hits: np.ndarray, scores: np.ndarray, missed: int) -> float:
    """Area under precision over recall. Each distinct score is a point, which reaches half way to its neighbours."""
    taken = scores >= np.unique(scores)[:, None]  # [points, predictions], from all predictions to the surest
    right = (taken & hits).sum(axis=1)
    precision = np.append(right / taken.sum(axis=1), 1.0)  # the point where nothing is predicted
    recall = np.append(right / (hits.sum() + missed), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)


def _mean(table: np.ndarray) -> float:
    """Mean of the entries that are not NaN, in percent."""
    known = table[~np.isnan(table)]
    return 100 * float(known.mean()) if known.size else float("nan")
