"""Panoptic quality of an image from counts, and of a dataset from the sums of these counts.

The rules are those of "Panoptic Segmentation" (Kirillov et al., CVPR 2019) and of its official evaluation, panopticapi.
A predicted segment and one of the ground truth match if they have one category and their IoU, without void pixels, is
above 0.5. Crowds are neither found nor missed. A prediction is ignored if more than half of it lies on void and on
crowds of its category. Things and stuff are matched alike.

    comparison = PanopticComparison(gt_map, gt_segments)       # prepared once per image
    statistics = comparison.compare(pred_map, pred_segments)   # once per exit
    image_pq(statistics)                                       # this image, in [0, 1]
    dataset_pq(total_statistics(many), categories)["All"]["pq"]  # the dataset, equal to panopticapi's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .statistics import ImageStatistics

VOID = 0
_DIRECT_IDS = 4096  # ids below this index the confusion matrix directly; larger ids are renumbered first


def image_pq(statistics: ImageStatistics) -> float:
    """Mean PQ of one image over the categories of its counts, in [0, 1]; 0.0 without counts."""
    if len(statistics.category_id) == 0:
        return 0.0
    return float(np.mean(statistics.iou / (statistics.tp + 0.5 * statistics.fp + 0.5 * statistics.fn)))


def image_statistics(
    pred_map: np.ndarray, pred_segments: Sequence[Mapping], gt_map: np.ndarray, gt_segments: Sequence[Mapping]
) -> ImageStatistics:
    """Compares one prediction with one ground truth; see `PanopticComparison` for the arguments."""
    return PanopticComparison(gt_map, gt_segments).compare(pred_map, pred_segments)


class PanopticComparison:
    """Compares the ground truth of one image with any number of predictions.

    gt_map: [H, W] integer ids, 0 is void. gt_segments: COCO's `segments_info`: `id`, `category_id`, optional `iscrowd`
    (0). As in panopticapi, an id of the map without a segment is background of unknown category, not void. The area of
    a segment is that of its mask, which keeps IoU and PQ in [0, 1]. panopticapi takes `area` of the annotation, so it
    differs if that is wrong.
    """

    def __init__(self, gt_map: np.ndarray, gt_segments: Sequence[Mapping]):
        gt_map = _checked_map(gt_map, "ground-truth")
        self.shape = gt_map.shape
        self.ids, self._index, self._changes = _renumber(gt_map)
        segment_ids = _checked_ids(gt_segments, "ground-truth")
        self._row = _position(self.ids, segment_ids)  # [G], -1 where the map lacks the segment
        self._category = np.array([s["category_id"] for s in gt_segments], dtype=np.int64)
        self._is_crowd = np.array([bool(s.get("iscrowd", 0)) for s in gt_segments], dtype=bool)
        self._area = np.append(np.bincount(self._index, minlength=len(self.ids)), 0)[self._row]
        # Of several crowds of one category the official evaluation uses the last.
        self._crowd = {int(c): g for g, c in enumerate(self._category) if self._is_crowd[g]}

    def compare(self, pred_map: np.ndarray, pred_segments: Sequence[Mapping]) -> ImageStatistics:
        """Counts matches, misses and false alarms of a prediction of the same size and the same category ids.

        pred_map: [H, W] integer ids, 0 is void. pred_segments: `id` and `category_id` of every id of the map. Raises
        ValueError if map and segments disagree, as the official evaluation does.
        """
        pred_map = _checked_map(pred_map, "predicted")
        if pred_map.shape != self.shape:
            raise ValueError(f"prediction is {pred_map.shape}, ground truth {self.shape}: resize the prediction first")
        confusion, pred_ids = self._confusion(pred_map)
        columns = _checked_columns(confusion, pred_ids, pred_segments)
        category = np.array([s["category_id"] for s in pred_segments], dtype=np.int64)  # [P]

        intersection = self._rows(confusion, self._row)[:, columns]  # [G, P]
        on_void = self._rows(confusion, _position(self.ids, np.array([VOID])))[0, columns]  # [P]
        area = confusion.sum(axis=0)[columns]  # [P]
        union = area[None] + self._area[:, None] - intersection - on_void[None]
        comparable = (self._category[:, None] == category[None]) & ~self._is_crowd[:, None] & (intersection > 0)
        iou = np.divide(intersection, union, out=np.zeros(union.shape), where=comparable)
        matched = iou > 0.5

        found = matched.any(axis=1)
        ignorable = on_void + self._on_own_crowd(intersection, category)
        false_alarm = ~matched.any(axis=0) & ~(ignorable / np.maximum(area, 1) > 0.5)
        return _by_category(
            true_positive=self._category[np.nonzero(matched)[0]],
            iou=iou[matched],
            false_positive=category[false_alarm],
            false_negative=self._category[~found & ~self._is_crowd],
        )

    def _confusion(self, pred_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel counts [ids of the ground truth, ids of the prediction], and the ids of the prediction.

        It counts runs in which neither map changes: a few thousand instead of hundreds of thousands of pixels.
        """
        flat = pred_map.ravel()
        starts = _run_starts((flat[1:] != flat[:-1]) | self._changes, flat.size)
        lengths = np.diff(np.append(starts, flat.size))
        index, pred = self._index[starts], flat[starts]
        top = int(pred.max(initial=0))
        pred_ids = np.arange(top + 1) if top < _DIRECT_IDS else np.unique(pred)
        column = pred if top < _DIRECT_IDS else np.searchsorted(pred_ids, pred)
        width = len(pred_ids)
        pairs = np.bincount(index * width + column, weights=lengths, minlength=len(self.ids) * width)
        return pairs.astype(np.int64).reshape(len(self.ids), width), pred_ids.astype(np.int64)

    @staticmethod
    def _rows(confusion: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """confusion[rows], with zeros for row -1."""
        picked = confusion[rows] if len(confusion) else np.zeros((len(rows), confusion.shape[1]), dtype=np.int64)
        return np.where(rows[:, None] >= 0, picked, 0)

    def _on_own_crowd(self, intersection: np.ndarray, category: np.ndarray) -> np.ndarray:
        pixels = np.zeros(len(category), dtype=np.int64)
        for p, c in enumerate(category):
            if int(c) in self._crowd:
                pixels[p] = intersection[self._crowd[int(c)], p]
        return pixels


def dataset_pq(total: ImageStatistics, categories: Iterable[Mapping]) -> dict:
    """PQ, SQ and RQ in [0, 1] of summed statistics.

    categories: COCO's panoptic categories, `id` and `isthing`, in the ids of the statistics. Returns {"All", "Things",
    "Stuff": {pq, sq, rq, n}, "per_class": {category id: {pq, sq, rq}}}: means over the n categories with counts, NaN if
    n is 0. Raises ValueError for statistics of a category that is not listed.
    """
    categories = {int(c["id"]): bool(c["isthing"]) for c in categories}
    row = {int(c): i for i, c in enumerate(total.category_id)}
    if unknown := sorted(set(row) - set(categories)):
        raise ValueError(f"statistics hold categories {unknown} that the dataset does not list")
    per_class = {c: _class_quality(total, row[c]) if c in row else dict(_ABSENT) for c in categories}
    groups = {
        "All": list(row),
        "Things": [c for c in row if categories[c]],
        "Stuff": [c for c in row if not categories[c]],
    }
    result = {name: _mean_quality([per_class[c] for c in members]) for name, members in groups.items()}
    return {**result, "per_class": per_class}


def pq_of_each(sums: np.ndarray) -> np.ndarray:
    """[R, 4, C] of iou, tp, fp, fn -> [R], the mean PQ over the categories that count; NaN where there is none."""
    iou, tp, fp, fn = np.moveaxis(sums, 1, 0)  # [R, C] each
    denominator = tp + 0.5 * fp + 0.5 * fn
    pq = np.divide(iou, denominator, out=np.zeros_like(iou), where=denominator > 0)
    number = np.count_nonzero(denominator, axis=1)
    return np.divide(pq.sum(axis=1), number, out=np.full(len(sums), np.nan), where=number > 0)


def to_dataset_categories(segments: Sequence[Mapping], dataset_id: Mapping[int, int]) -> list[dict]:
    """Copies of segments with the dataset's category ids instead of contiguous ids; see `contiguous_to_dataset_id`."""
    try:
        return [{**s, "category_id": dataset_id[s["category_id"]]} for s in segments]
    except KeyError as error:
        raise ValueError(
            f"category {error.args[0]} is predicted, but the dataset has {len(dataset_id)} of them: check NUM_CLASSES"
        ) from error


def contiguous_to_dataset_id(metadata) -> dict[int, int]:
    """{contiguous category id, which models predict: id in the dataset's files}, from detectron2's metadata."""
    forward = {**metadata.stuff_dataset_id_to_contiguous_id, **metadata.thing_dataset_id_to_contiguous_id}
    return {contiguous: dataset for dataset, contiguous in forward.items()}


_ABSENT = {"pq": 0.0, "sq": 0.0, "rq": 0.0}


def _by_category(true_positive, iou, false_positive, false_negative) -> ImageStatistics:
    """Statistics from one category id per event. iou: of each of `true_positive`."""
    category = np.unique(np.concatenate([true_positive, false_positive, false_negative]))

    def count(events, weights=None):
        return np.bincount(np.searchsorted(category, events), weights=weights, minlength=len(category))

    iou_sum = count(true_positive, iou).astype(np.float64)
    return ImageStatistics(category, iou_sum, count(true_positive), count(false_positive), count(false_negative))


def _class_quality(total: ImageStatistics, i: int) -> dict:
    iou, tp = float(total.iou[i]), int(total.tp[i])
    denominator = tp + 0.5 * int(total.fp[i]) + 0.5 * int(total.fn[i])
    return {"pq": iou / denominator, "sq": iou / tp if tp else 0.0, "rq": tp / denominator}


def _mean_quality(classes: Sequence[Mapping]) -> dict:
    n = len(classes)
    return {**{key: sum(c[key] for c in classes) / n if n else float("nan") for key in _ABSENT}, "n": n}


def _run_starts(changes: np.ndarray, size: int) -> np.ndarray:
    """Indices of the first pixels of runs. changes [size - 1]: whether a pixel differs from the one before."""
    return np.concatenate([[0], np.flatnonzero(changes) + 1]) if size else np.zeros(0, dtype=np.int64)


def _renumber(id_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted ids of a map, the flat map as int64 indices into them, and where a pixel differs from the one before.

    Only the first pixels of runs are sorted.
    """
    flat = id_map.ravel()
    changes = flat[1:] != flat[:-1]
    starts = _run_starts(changes, flat.size)
    ids, inverse = np.unique(flat[starts], return_inverse=True)
    return ids.astype(np.int64), np.repeat(inverse, np.diff(np.append(starts, flat.size))), changes


def _position(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of each wanted id in the sorted ids, or -1."""
    if len(ids) == 0:
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def _checked_map(id_map: np.ndarray, which: str) -> np.ndarray:
    id_map = np.asarray(id_map)
    if id_map.ndim != 2 or not np.issubdtype(id_map.dtype, np.integer):
        raise ValueError(f"the {which} map must be [H, W] of integer ids, got {id_map.shape} of {id_map.dtype}")
    if id_map.min(initial=0) < 0:
        raise ValueError(f"the {which} map holds the id {id_map.min()}: ids must not be negative, and 0 is void")
    return id_map


def _checked_ids(segments: Sequence[Mapping], which: str) -> np.ndarray:
    ids = np.array([s["id"] for s in segments], dtype=np.int64)
    if VOID in ids or len(np.unique(ids)) != len(ids):
        raise ValueError(f"{which} segment ids must be unique and not 0 (void), got {ids.tolist()}")
    return ids


def _checked_columns(confusion: np.ndarray, pred_ids: np.ndarray, segments: Sequence[Mapping]) -> np.ndarray:
    """The column of each predicted segment in the confusion matrix. Map and segments must have the same ids."""
    ids = _checked_ids(segments, "predicted")
    present = set(pred_ids[confusion.sum(axis=0) > 0].tolist()) - {VOID}
    if present != set(ids.tolist()):
        raise ValueError(
            f"ids only in the predicted map: {sorted(present - set(ids.tolist()))}, only in its segments: "
            f"{sorted(set(ids.tolist()) - present)}; both must have the same ids"
        )
    return _position(pred_ids, ids)
