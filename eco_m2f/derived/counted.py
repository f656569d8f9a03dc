"""The exact quality of many datasets at once, each made of a derived dataset's images counted more or less often.

Draws of a mixture and resamples of the images are such datasets. Their sums are one sparse product.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix

from ..quality.statistics import ImageStatistics
from .dataset import DerivedDataset

Part = tuple[np.ndarray, np.ndarray]  # a choice of exits [N], and how often each image counts with it [R, N]
_AT_ONCE = 32  # datasets summed at a time, few enough for the caches


class CountedQuality:
    """The exact quality of R datasets of counted images; of a derived dataset that has statistics."""

    def __init__(self, dataset: DerivedDataset):
        self.dataset, self.kind = dataset, dataset.quality_kind
        self.ids = np.unique(dataset.statistics.category)

    def __call__(self, parts: Sequence[Part]) -> dict[str, np.ndarray]:
        """{column: [R] in [0, 1]}: the r-th dataset has image i counts[r, i] times at exit choice[i], for each part."""
        matrices = [(self._matrix(choice), counts) for choice, counts in parts]
        found = []
        for first in range(0, len(parts[0][1]), _AT_ONCE):
            chunk = slice(first, first + _AT_ONCE)
            sums = sum(matrix @ counts[chunk].T.astype(np.float64) for matrix, counts in matrices)  # [4 * C, r]
            found.append(self._exact(sums.T.reshape(-1, 4, len(self.ids))))
        return {column: np.concatenate([values[column] for values in found]) for column in found[0]}

    def _exact(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """[r, 4, C] of iou, tp, fp, fn -> {column: [r]}."""
        categories = self.dataset.provenance["categories"]
        if hasattr(self.kind, "exact_each"):
            return self.kind.exact_each(self.ids, sums, categories)
        found = [self.kind.exact(total, categories) for total in self._totals(sums)]
        return {column: np.array([values[column] for values in found]) for column in found[0]}

    def _totals(self, sums: np.ndarray) -> Iterator[ImageStatistics]:
        for iou, *counted in sums:
            present = np.flatnonzero(sum(counted))
            whole = (values[present].astype(np.int64) for values in counted)
            yield ImageStatistics(self.ids[present], iou[present], *whole)

    def _matrix(self, choice: np.ndarray) -> csr_matrix:
        """[4 * C, N]: iou, tp, fp and fn of each category and image, at the image's exit."""
        statistics, number = self.dataset.statistics, len(self.dataset)
        slots = np.arange(number) * statistics.num_exits + self.dataset.columns(choice)
        entries, image = statistics.entries(slots), np.repeat(np.arange(number), statistics.lengths(slots))
        category = np.searchsorted(self.ids, statistics.category[entries])
        values = [v[entries] for v in (statistics.iou, statistics.tp, statistics.fp, statistics.fn)]
        rows = np.concatenate([category + i * len(self.ids) for i in range(4)])
        shape = (4 * len(self.ids), number)
        return csr_matrix((np.concatenate(values).astype(np.float64), (rows, np.tile(image, 4))), shape=shape)
