"""The derived dataset (Step B): the quality and cost of every image at every exit, without images or models.

It has one row per image: the quality q_k at each exit, the pooled feature that a gate reads, and the cost. If the
quality of a whole dataset is a sum over its images, a row also has the statistics to sum. A gate is fitted to these
rows. They give the exact quality and GFLOPs of ANY choice of exits as sums, without inference. beta is not stored, so a
new budget needs no new rows.

Format: `manifest.json` with the provenance, and Parquet shards. Each shard is a fixed range of the dataset's order. Its
bytes depend only on its rows and the provenance, not on the number of processes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..quality import quality_named
from ..quality.statistics import ImageStatistics
from .schema import (
    PER_EXIT,
    PROVENANCE_AND_OPTIONAL,
    STATISTICS,
    VIEW_KEY,
    VIEWS,
    DerivedDatasetError,
    quality_name,
    read_manifest,
)
from .shards import abridged, join_shards, present_shards


@dataclass(frozen=True)
class DerivedDataset:
    """A whole derived dataset in memory: N images, E exits, C channels.

    provenance: a dict of `PROVENANCE_KEYS`, and perhaps some of `OPTIONAL`.
    """

    provenance: dict
    image_ids: list[str]  # N
    file_names: list[str]  # N
    sizes: np.ndarray  # [N, 2] height, width
    quality: np.ndarray  # [N, E] float64
    features: np.ndarray | None  # [N, C] float32
    total_gflops: np.ndarray  # [N, E] float64
    encoder_gflops: np.ndarray  # [N, E] float64
    statistics: "_SparseStatistics"

    @classmethod
    def load(cls, path: str | Path, with_features: bool = True) -> "DerivedDataset":
        """Reads it. Raises FileNotFoundError if there is none, DerivedDatasetError if it is incomplete or damaged."""
        path = Path(path)
        manifest = read_manifest(path)
        shards = range(-(-manifest["num_images"] // manifest["shard_size"]))
        present = present_shards(path)
        lacking = list(itertools.islice((s for s in shards if s not in present), 11))  # there may be very many
        if lacking:
            number = len(shards) - sum(s in shards for s in present)
            raise DerivedDatasetError(
                f"{path} lacks {number} of {len(shards)} shards ({abridged(lacking)}): run derive_dataset.py again to "
                "continue it"
            )
        return cls(**_fields(path, manifest, shards, with_features))

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(self.provenance["exits"])

    @property
    def quality_name(self) -> str:
        """The name of the quality, such as "PQ"."""
        return quality_name(self.provenance)

    @property
    def view(self) -> str:
        """How the model saw the images: "plain" or "mirrored"."""
        return self.provenance.get(VIEW_KEY, VIEWS[0])

    @property
    def quality_kind(self) -> type:
        """The member of `QUALITY_REGISTRY`. Raises ValueError if it is unknown."""
        return quality_named(self.quality_name)

    @property
    def has_statistics(self) -> bool:
        """Whether `exact_quality` works. It does not if the quality is no sum over the images."""
        return len(self.statistics.category) > 0

    def columns(self, choice) -> np.ndarray:
        """The column of each image's exit: choice [N] of exits -> indices into `exits`, [N].

        Raises ValueError for a wrong length or an exit that the dataset does not have.
        """
        choice, exits = np.asarray(choice), np.asarray(self.exits)
        if choice.shape != (len(self),):
            raise ValueError(f"the choice must be one exit for each of {len(self)} images, not {list(choice.shape)}")
        unknown = sorted(set(np.unique(choice).tolist()) - set(exits.tolist()))
        if unknown:
            raise ValueError(f"exits {unknown} are chosen, the derived dataset has {list(self.exits)}")
        return np.searchsorted(exits, choice)

    def exact_quality(self, choice) -> dict[str, float]:
        """The quality of the whole dataset, in [0, 1], if image i leaves at exit choice[i].

        The keys depend on the quality. PQ has "pq", "pq_things" and "pq_stuff"; a value is NaN if no such category
        occurs. Raises DerivedDatasetError if there are no statistics, ValueError for an unknown quality.
        """
        exact = self.quality_kind.exact
        if exact is None or not self.has_statistics:
            raise DerivedDatasetError(
                f"{self.provenance['dataset']} has no statistics of {self.quality_name}: use mean_quality"
            )
        return exact(self.statistics.total(self.columns(choice)), self.provenance["categories"])

    def mean_quality(self, choice) -> float:
        """The mean over the images of the quality at the chosen exit."""
        return self._mean(self.quality, choice)

    def mean_gflops(self, choice) -> dict[str, float]:
        """The mean GFLOPs over the images: {"total", "encoder"}."""
        return {"total": self._mean(self.total_gflops, choice), "encoder": self._mean(self.encoder_gflops, choice)}

    def mean_exit(self, choice) -> float:
        self.columns(choice)
        return float(np.mean(choice))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "DerivedDataset":
        """The images at these positions, in this order (a copy)."""
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return DerivedDataset(
            provenance={**self.provenance, "num_images": len(rows)},
            image_ids=[self.image_ids[i] for i in rows],
            file_names=[self.file_names[i] for i in rows],
            sizes=self.sizes[rows],
            quality=self.quality[rows],
            features=None if self.features is None else self.features[rows],
            total_gflops=self.total_gflops[rows],
            encoder_gflops=self.encoder_gflops[rows],
            statistics=self.statistics.subset(rows),
        )

    def _mean(self, table: np.ndarray, choice) -> float:
        return float(table[np.arange(len(self)), self.columns(choice)].mean())


@dataclass(frozen=True)
class _SparseStatistics:
    """The entries of slot image * E + exit column are those from offsets[slot] to offsets[slot + 1] - 1."""

    num_exits: int
    offsets: np.ndarray  # [N * E + 1] int64
    category: np.ndarray  # [entries] int32, the dataset's category id
    iou: np.ndarray  # [entries] float64
    tp: np.ndarray  # [entries] int32
    fp: np.ndarray  # [entries] int32
    fn: np.ndarray  # [entries] int32

    def total(self, columns: np.ndarray) -> ImageStatistics:
        """The sums per category if image i takes the exit of columns[i]."""
        entries = self.entries(np.arange(len(columns)) * self.num_exits + columns)
        ids, category = np.unique(self.category[entries], return_inverse=True)  # ids may be up to 2^31 - 1
        sums = [np.bincount(category, values[entries], len(ids)) for values in (self.iou, self.tp, self.fp, self.fn)]
        present = np.flatnonzero(sums[1] + sums[2] + sums[3])
        iou, *counts = (s[present] for s in sums)
        return ImageStatistics(ids[present], iou, *(c.astype(np.int64) for c in counts))

    def subset(self, rows: np.ndarray) -> "_SparseStatistics":
        slots = (rows[:, None] * self.num_exits + np.arange(self.num_exits)).ravel()
        entries = self.entries(slots)
        offsets = np.concatenate([[0], np.cumsum(self.lengths(slots))])
        values = (v[entries] for v in (self.category, self.iou, self.tp, self.fp, self.fn))
        return _SparseStatistics(self.num_exits, offsets, *values)

    def entries(self, slots: np.ndarray) -> np.ndarray:
        """The positions of all entries of these slots, slot by slot."""
        start, count = self.offsets[slots], self.lengths(slots)
        before = np.cumsum(count) - count
        return np.repeat(start - before, count) + np.arange(count.sum())

    def lengths(self, slots: np.ndarray) -> np.ndarray:
        """The number of entries of each slot."""
        return self.offsets[slots + 1] - self.offsets[slots]


def _fields(path: Path, manifest: Mapping, shards: Sequence[int], with_features: bool) -> dict:
    """The fields of a DerivedDataset."""
    num_images, exits = manifest["num_images"], manifest["exits"]
    joined, counts, features = join_shards(path, manifest, shards, with_features)
    return {
        "provenance": {key: manifest[key] for key in PROVENANCE_AND_OPTIONAL if key in manifest},
        "image_ids": joined["image_id"].tolist(),
        "file_names": joined["file_name"].tolist(),
        "sizes": np.stack([joined["height"], joined["width"]], axis=1),
        "features": features,
        **{name: joined[name].reshape(num_images, -1) for name in PER_EXIT},
        "statistics": _index_statistics(joined, counts, exits),
    }


def _index_statistics(joined: Mapping[str, np.ndarray], counts: np.ndarray, exits: Sequence[int]) -> _SparseStatistics:
    image = np.repeat(np.arange(len(counts)), counts)
    slot = image * len(exits) + np.searchsorted(exits, joined["stat_exit"])
    if np.any(np.diff(slot) < 0):  # other writers may use another order
        order = np.argsort(slot, kind="stable")
        slot, joined = slot[order], {name: joined[name][order] for name in STATISTICS}
    offsets = np.concatenate([[0], np.cumsum(np.bincount(slot, minlength=len(counts) * len(exits)))])
    return _SparseStatistics(len(exits), offsets, *(joined[name] for name in STATISTICS))
