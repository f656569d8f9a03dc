"""Statistics of an image: counts whose sum gives the exact quality of a dataset."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_COUNTS = ("iou", "tp", "fp", "fn")


@dataclass(frozen=True)
class ImageStatistics:
    """Counts of segments or pixels by category: five arrays [C], sorted by category, without empty categories."""

    category_id: np.ndarray  # int64
    iou: np.ndarray  # float64, the sum of the matches' IoU, at most tp
    tp: np.ndarray  # int64, matches
    fp: np.ndarray  # int64, false alarms
    fn: np.ndarray  # int64, misses


def total_statistics(statistics: Iterable[ImageStatistics]) -> ImageStatistics:
    """Sums category by category, in the given order."""
    statistics = list(statistics)
    if not statistics:
        none = np.zeros(0, dtype=np.int64)
        return ImageStatistics(none, np.zeros(0), none, none, none)
    joined = {name: np.concatenate([getattr(s, name) for s in statistics]) for name in ("category_id", *_COUNTS)}
    category, inverse = np.unique(joined["category_id"], return_inverse=True)
    sums = {name: np.bincount(inverse, weights=joined[name], minlength=len(category)) for name in _COUNTS}
    return ImageStatistics(category, sums["iou"], *(sums[name].astype(np.int64) for name in ("tp", "fp", "fn")))
