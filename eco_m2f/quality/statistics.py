"""What a quality keeps of one image where the quality of a dataset is an exact sum over its images."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_COUNTS = ("iou", "tp", "fp", "fn")


@dataclass(frozen=True)
class ImageStatistics:
    """Counts by category: five arrays of one length, sorted by category, categories without a count left out.

    category_id: int64; tp, fp, fn: int64, matches, false alarms and misses; iou: float64, the sum of the
    matches' IoU, at most tp. What is counted is the quality's choice: segments, or pixels.
    """

    category_id: np.ndarray
    iou: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


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
