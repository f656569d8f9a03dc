"""The derived dataset (Step B): what every image was worth at every exit, in numbers, without images or models.

One row per image: the quality q_k at each exit, the pooled feature that a gate reads, the statistics that the panoptic
quality of the whole dataset is a sum of, and the cost. From these rows a gate is fitted, and the exact PQ and GFLOPs
of ANY assignment of exits to images are sums: no inference. beta is not stored, so a new budget needs no new rows.

Format: `manifest.json` with the provenance, and Parquet shards of a fixed range of the dataset's order each. A shard's
bytes depend on its rows and the provenance alone, not on how many processes shared the work.
"""

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from .derived_schema import (
    FORMAT,
    MANIFEST,
    PER_EXIT,
    PROVENANCE_AND_OPTIONAL,
    PROVENANCE_KEYS,
    SCHEMA,
    STATISTICS,
    DerivedDatasetError,
    check_manifest,
    check_rows,
    column_digests,
    manifest_text,
    read_manifest,
    short,
)
from .derived_shards import (
    abridged,
    image_digests_of,
    join_shards,
    present_shards,
    problem,
    shard_indices,
    shard_path,
)
from .evaluation.panoptic_quality import ImageStatistics, dataset_pq
from .exits import check_exits
from .files import atomic_write, remove_leftovers
from .safe_load import weights_sha256

__all__ = [
    "MANIFEST",
    "PROVENANCE_KEYS",
    "DerivedDataset",
    "DerivedDatasetError",
    "ShardWriter",
    "make_row",
    "parent_sha256",
]
logger = logging.getLogger(__name__)

DEFAULT_MEASURE = "PQ"  # of the quality; another is named in the provenance under the key "measure"


def make_row(
    *,
    image_id: str | int,
    file_name: str,
    height: int,
    width: int,
    quality: Sequence[float],
    feature: Sequence[float] | Tensor | np.ndarray,
    statistics: Mapping[int, ImageStatistics],
    total_gflops: Sequence[float],
    encoder_gflops: Sequence[float],
) -> dict:
    """One image as `ShardWriter.write` takes it. statistics: {exit: statistics}; empty where quality is not PQ."""
    entries = [(k, statistics[k]) for k in sorted(statistics)]

    def flat(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(getattr(s, name), dtype) for _, s in entries)])

    return {
        "image_id": str(image_id),
        "file_name": str(file_name),
        "height": int(height),
        "width": int(width),
        "quality": np.asarray(quality, np.float64),
        "feature": np.asarray(feature, np.float32),
        "total_gflops": np.asarray(total_gflops, np.float64),
        "encoder_gflops": np.asarray(encoder_gflops, np.float64),
        "stat_exit": np.repeat([k for k, _ in entries], [len(s.category_id) for _, s in entries]).astype(np.int32),
        "stat_category": flat("category_id", np.int32),
        "stat_iou": flat("iou", np.float64),
        "stat_tp": flat("tp", np.int32),
        "stat_fp": flat("fp", np.int32),
        "stat_fn": flat("fn", np.int32),
    }


class ShardWriter:
    """Writes a derived dataset shard by shard, from any number of processes, and goes on where it was stopped.

    Shard s holds the images s * shard_size to (s + 1) * shard_size - 1 of the dataset's order. Every process opens the
    directory with the same arguments, asks for `missing(rank, world_size)`, and writes those shards:

        writer = ShardWriter(directory, provenance, num_images=len(dataset))
        for shard in writer.missing(rank, world_size):
            writer.write(shard, [derive(dataset[i]) for i in writer.indices(shard)])
    """

    def __init__(
        self,
        directory: str | Path,
        provenance: Mapping,
        num_images: int,
        shard_size: int = 256,
        images: Callable[[Sequence[int]], Mapping[str, str]] | None = None,
    ):
        """provenance: `PROVENANCE_KEYS`, plain JSON values; num_images may be left out, those of `OPTIONAL` put in.
        images: positions in the dataset's order -> digests of these images, by kind, so that a change of them shows.

        Raises DerivedDatasetError for a value that cannot be, and if the directory holds a derived dataset of another
        provenance, whose keys it names.
        """
        if num_images < 1 or shard_size < 1:
            raise ValueError(f"num_images and shard_size must be positive: {num_images}, {shard_size}")
        self.directory = Path(directory)
        self._images = images
        self.manifest = _make_manifest({"num_images": num_images, **provenance}, num_images, shard_size)
        self.num_shards = -(-num_images // shard_size)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / MANIFEST).exists():
            with atomic_write(self.directory / MANIFEST, "w") as file:
                file.write(manifest_text(self.manifest))
        _check_same(read_manifest(self.directory), self.manifest, self.directory)

    def indices(self, shard: int) -> range:
        """The images of a shard, as positions in the dataset's order."""
        return shard_indices(self.manifest, shard)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """The shards that this process has to write; a damaged one counts, with a warning.

        Removes what a killed process left unfinished in these shards. Shards go to ranks by their number, so that
        ranks that start at different times never take the same one.
        Raises DerivedDatasetError where the images of a finished shard have changed since.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}: {rank}")
        missing = []
        for shard in range(rank, self.num_shards, world_size):
            path = shard_path(self.directory, shard)
            remove_leftovers(self.directory, path.name)
            if not path.exists():
                missing.append(shard)
            elif reason := problem(path, self.manifest, shard):
                logger.warning("%s is written anew: %s", path, reason)
                missing.append(shard)
            else:
                self._check_images(path, shard)
        return missing

    def _check_images(self, path: Path, shard: int) -> None:
        before = image_digests_of(path)
        now = self._images(self.indices(shard)) if self._images and before else {}
        changed = [kind for kind in now if before.get(kind, now[kind]) != now[kind]]
        if changed:
            raise DerivedDatasetError(
                f"the images of {path} have changed since it was written ({' and '.join(changed)}): restore them, or "
                "use another directory. Where the change is meant, remove the shards made before it"
            )

    def write(self, shard: int, rows: Sequence[Mapping]) -> None:
        """Writes a shard whole or not at all. rows: see `make_row`, one for each of `indices(shard)`, in that order.

        Raises ValueError for a wrong number of rows, a row that is incomplete, or a value that no image can have.
        """
        expected = self.indices(shard)
        if len(rows) != len(expected):
            raise ValueError(f"shard {shard} has {len(expected)} images, {len(rows)} rows are given")
        for row in rows:
            if set(row) != set(SCHEMA.names):
                name = row.get("image_id")
                raise ValueError(f"the row of image {name!r} has the keys {sorted(row)}: build it with make_row")
        table = pa.table({f.name: [row[f.name] for row in rows] for f in SCHEMA}, schema=SCHEMA)
        check_rows(table, self.manifest)
        about = {"eco_m2f": {**self.manifest, "shard": shard}, "sha256": column_digests(table)}
        if self._images:
            about["images"] = self._images(expected)
        table = table.replace_schema_metadata({key: json.dumps(v, sort_keys=True) for key, v in about.items()})
        with atomic_write(shard_path(self.directory, shard)) as file:
            # Numbers of this kind hardly repeat: no dictionaries. Checksums make a damaged page show.
            pq.write_table(table, file, compression="zstd", use_dictionary=False, write_page_checksum=True)


@dataclass(frozen=True)
class DerivedDataset:
    """A whole derived dataset in memory: N images, E exits, C channels.

    image_ids, file_names: N strings; sizes [N, 2]: height, width; quality, total_gflops, encoder_gflops: [N, E]
    float64; features: [N, C] float32, or None; provenance: `PROVENANCE_KEYS`.
    """

    provenance: dict
    image_ids: list[str]
    file_names: list[str]
    sizes: np.ndarray
    quality: np.ndarray
    features: np.ndarray | None
    total_gflops: np.ndarray
    encoder_gflops: np.ndarray
    statistics: "_SparseStatistics"

    @classmethod
    def load(cls, path: str | Path, with_features: bool = True) -> "DerivedDataset":
        """Raises FileNotFoundError where there is none, DerivedDatasetError if it is incomplete or damaged."""
        path = Path(path)
        manifest = read_manifest(path)
        shards = range(-(-manifest["num_images"] // manifest["shard_size"]))
        present = present_shards(path)
        lacking = list(itertools.islice((s for s in shards if s not in present), 11))  # there may be very many
        if lacking:
            number = len(shards) - sum(s in shards for s in present)
            raise DerivedDatasetError(
                f"{path} lacks {number} of {len(shards)} shards ({abridged(lacking)}): derive_dataset.py goes on"
            )
        return cls(**_fields(path, manifest, shards, with_features))

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(self.provenance["exits"])

    @property
    def measure(self) -> str:
        """The name of the quality, such as "PQ"."""
        return self.provenance.get("measure", DEFAULT_MEASURE)

    @property
    def has_statistics(self) -> bool:
        """Whether the PQ of the dataset can be had; not so where the quality is another measure."""
        return len(self.statistics.category) > 0

    def columns(self, choice) -> np.ndarray:
        """The column of each image's exit: choice [N] of exits -> [N] of indices into `exits`.

        Raises ValueError for a wrong length or an exit that the dataset does not have.
        """
        choice, exits = np.asarray(choice), np.asarray(self.exits)
        if choice.shape != (len(self),):
            raise ValueError(f"the choice must be one exit for each of {len(self)} images, not {list(choice.shape)}")
        unknown = sorted(set(np.unique(choice).tolist()) - set(exits.tolist()))
        if unknown:
            raise ValueError(f"exits {unknown} are chosen, the derived dataset has {list(self.exits)}")
        return np.searchsorted(exits, choice)

    def dataset_pq(self, choice) -> dict[str, float]:
        """The exact PQ in [0, 1], {"All", "Things", "Stuff"}, when image i leaves at exit choice[i].

        NaN where no category of the kind occurs. Raises DerivedDatasetError if there are no statistics.
        """
        if not self.has_statistics:
            raise DerivedDatasetError(f"{self.provenance['dataset']} has no statistics of PQ: use mean_quality")
        total = self.statistics.total(self.columns(choice))
        result = dataset_pq(total, self.provenance["categories"])
        return {name: result[name]["pq"] for name in ("All", "Things", "Stuff")}

    def mean_quality(self, choice) -> float:
        """The mean over the images of q at the chosen exit."""
        return self._mean(self.quality, choice)

    def mean_gflops(self, choice) -> dict[str, float]:
        """The mean over the images: {"total", "encoder"}."""
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
    """Entry e belongs to the slot (image, exit column) with offsets[slot] <= e < offsets[slot + 1]."""

    num_exits: int
    offsets: np.ndarray  # [N * E + 1] int64
    category: np.ndarray  # [entries] int32, the dataset's category id; so are the others:
    iou: np.ndarray  # float64
    tp: np.ndarray  # int32
    fp: np.ndarray
    fn: np.ndarray

    def total(self, columns: np.ndarray) -> ImageStatistics:
        """The sums per category when image i takes the exit of columns[i]."""
        entries = self._entries(np.arange(len(columns)) * self.num_exits + columns)
        ids, category = np.unique(self.category[entries], return_inverse=True)  # an id may be as large as 2^31 - 1
        sums = [np.bincount(category, values[entries], len(ids)) for values in (self.iou, self.tp, self.fp, self.fn)]
        present = np.flatnonzero(sums[1] + sums[2] + sums[3])
        iou, *counts = (s[present] for s in sums)
        return ImageStatistics(ids[present], iou, *(c.astype(np.int64) for c in counts))

    def subset(self, rows: np.ndarray) -> "_SparseStatistics":
        slots = (rows[:, None] * self.num_exits + np.arange(self.num_exits)).ravel()
        entries = self._entries(slots)
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[slots])])
        values = (v[entries] for v in (self.category, self.iou, self.tp, self.fp, self.fn))
        return _SparseStatistics(self.num_exits, offsets, *values)

    def _entries(self, slots: np.ndarray) -> np.ndarray:
        """The positions of all entries of these slots, slot by slot."""
        start = self.offsets[slots]
        count = self.offsets[slots + 1] - start
        before = np.cumsum(count) - count
        return np.repeat(start - before, count) + np.arange(count.sum())


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
    if np.any(np.diff(slot) < 0):  # other writers may have another order
        order = np.argsort(slot, kind="stable")
        slot, joined = slot[order], {name: joined[name][order] for name in STATISTICS}
    offsets = np.concatenate([[0], np.cumsum(np.bincount(slot, minlength=len(counts) * len(exits)))])
    return _SparseStatistics(len(exits), offsets, *(joined[name] for name in STATISTICS))


def parent_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """The sha256 of weights: of names, dtypes, shapes and values, whatever the order and the file around them.

    Keys of the exit policy ("exit_policy.") do not count: they are not the parent's.
    """
    return weights_sha256({name: v for name, v in state_dict.items() if not name.startswith("exit_policy.")})


# --- the manifest ----------------------------------------------------------------------------------------------------


def _make_manifest(provenance: Mapping, num_images: int, shard_size: int) -> dict:
    if provenance["num_images"] != num_images:
        raise ValueError(f"the provenance says {provenance['num_images']} images, num_images is {num_images}")
    manifest = {"format": FORMAT, "shard_size": shard_size, **provenance}
    manifest["exits"] = list(check_exits(provenance["exits"]))
    manifest = json.loads(json.dumps(manifest))  # as it will be read back: tuples are lists
    check_manifest(manifest)
    return manifest


def _check_same(found: Mapping, wanted: Mapping, directory: Path) -> None:
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if different:
        changes = "; ".join(f"{k}: {short(found.get(k))} there, {short(wanted.get(k))} now" for k in different)
        raise DerivedDatasetError(
            f"{directory} holds a derived dataset of another origin. Different are {changes}. "
            "Use another directory, or the same settings as before"
        )
