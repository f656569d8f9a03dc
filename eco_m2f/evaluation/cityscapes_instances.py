"""Cityscapes' own AP of instances, computed here; https://www.cityscapes-dataset.com/benchmarks defines it.

AP is the mean over the 8 things and over IoU thresholds .5, .55 ... .95. It differs from COCO's: an object below 100
pixels is neither demanded nor counted against a prediction on it, nor are regions of several objects (groups) and void;
there is no limit of detections; an object may be found once, and each further prediction on it is a mistake; the curve
of precision over recall is taken as it is, without making it monotonous.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.images import DataError, open_image
from ..quality.ground_truth import PanopticGroundTruth
from .collect import RowEvaluator, without_nan

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # as the benchmark writes them, with their rounding
MIN_PIXELS = 100
INSTANCES = 1000  # an id from here on is label * 1000 + number; one below is a bare label: stuff, a group or void
SUFFIX = "_gtFine_instanceIds.png"
ADVICE = "unpack gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com as datasets/README.md shows"


@dataclass(frozen=True)
class Prediction:
    """A predicted object: its label, and how many of its pixels lie on void and on each id of the annotation."""

    label: int
    score: float
    pixels: int
    void: int
    on: Mapping[int, int]


@dataclass(frozen=True)
class ImageInstances:
    """What the metric needs of an image: {id: pixels} of the annotation, and the predictions."""

    annotated: Mapping[int, int]
    predictions: Sequence[Prediction]


class CityscapesInstances:
    """The *_gtFine_instanceIds.png of a registered Cityscapes panoptic dataset, and its classes.

    The panoptic PNGs do not serve: caravans and trailers with numbers are void there, but not to this metric.
    Raises ValueError where files are missing.
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
            raise ValueError(f"{missing[0]} is missing ({len(missing)} such in all), AP needs it: {ADVICE}")

    def path(self, image_id: str) -> Path:
        """The file of an image, whose id is <city>_<sequence>_<frame>."""
        return self._folder / image_id.split("_")[0] / f"{image_id}{SUFFIX}"

    def ids(self, image_id: str) -> np.ndarray:
        """[H, W] integers. Raises ValueError where the file cannot be read or is no map of ids."""
        path = self.path(image_id)
        try:
            ids = np.asarray(open_image(path, "PNG of instance ids", ("PNG",)).image)
        except DataError as error:
            raise ValueError(f"{error}; {ADVICE}") from error
        if ids.ndim != 2:
            raise ValueError(f"{path}: expected one channel of 16 bits, got shape {ids.shape}: {ADVICE}")
        return ids.astype(np.int64)

    def compare(self, ids: np.ndarray, masks: np.ndarray, labels: Iterable[int], scores: Iterable[float]):
        """`ImageInstances` of ids [H, W] and predicted masks (bool [N, H, W]) with their labels and scores."""
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

    `evaluate` returns {"segm": {AP, AP50, AP-<class>}} in percent, NaN for a class that no image holds. With an
    output_dir it also writes `instances.json`, the same.
    """

    def __init__(self, ground_truth: CityscapesInstances, output_dir: str | None = None):
        self._ground_truth = ground_truth
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> ImageInstances:
        truth, found = self._ground_truth, y["instances"].to("cpu")
        ids = truth.ids(x["image_id"])
        masks = found.pred_masks.to(torch.bool).numpy()
        if masks.shape[1:] != ids.shape:
            raise ValueError(f"{truth.path(x['image_id'])} is {ids.shape}, the predicted masks are {masks.shape[1:]}")
        kept = [i for i, c in enumerate(found.pred_classes.tolist()) if c in truth.label_of]  # things alone
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
    """AP of a label at an IoU threshold, in [0, 1]; NaN where no image holds an object of it that counts."""
    hits, scores, missed, wanted = [], [], 0, 0
    for image in images:
        objects = [(i, n) for i, n in image.annotated.items() if i // INSTANCES == label and n >= MIN_PIXELS]
        predictions = [p for p in image.predictions if p.label == label]
        wanted += len(objects)
        for i, pixels in objects:
            found = sorted((p.score for p in predictions if _iou(p, i, pixels) > threshold), reverse=True)
            hits += [j == 0 for j in range(len(found))]  # the surest is right, all others are mistakes
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
    """Whether it is on no object, and not mostly on what does not count: void, groups, objects that are small."""
    ignored = prediction.void
    for i, common in prediction.on.items():
        if prediction.label not in (i, i // INSTANCES):
            continue
        if _iou(prediction, i, annotated[i]) > threshold:
            return False
        is_group, is_small = i < INSTANCES, annotated[i] < MIN_PIXELS
        ignored += common * (is_group + is_small)  # a group that is small counts twice, as in the benchmark
    return ignored / prediction.pixels <= threshold


def _area(hits: np.ndarray, scores: np.ndarray, missed: int) -> float:
    """Area under precision over recall: a point for each distinct score, each as wide as half way to its neighbours."""
    taken = scores >= np.unique(scores)[:, None]  # [points, predictions], from all of them to the surest
    right = (taken & hits).sum(axis=1)
    precision = np.append(right / taken.sum(axis=1), 1.0)  # the point where nothing is predicted
    recall = np.append(right / (hits.sum() + missed), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)


def _mean(table: np.ndarray) -> float:
    """Percent, of the entries that exist."""
    known = table[~np.isnan(table)]
    return 100 * float(known.mean()) if known.size else float("nan")
