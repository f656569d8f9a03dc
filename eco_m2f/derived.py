"""The derived dataset (Step B): what every image was worth at every exit, in numbers, without images or models.

One row per image: the quality q_k at each exit, the pooled feature that a gate reads, the statistics that the panoptic
quality of the whole dataset is a sum of, and the cost. From these rows a gate is fitted, and the exact PQ and GFLOPs
of ANY assignment of exits to images are sums: no inference. beta is not stored, so a new budget needs no new rows.

Format: `manifest.json` with the provenance, and Parquet shards of a fixed range of the dataset's order each. A shard's
bytes depend on its rows and the provenance alone, not on how many processes shared the work.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .evaluation.panoptic_quality import ImageStatistics, dataset_pq
from .exits import check_exits
from .files import atomic_write

logger = logging.getLogger(__name__)

FORMAT = "eco_m2f.derived.v1"
MANIFEST = "manifest.json"
PROVENANCE_KEYS = (
    "exits",  # layer numbers, the E columns of quality and of the costs
    "config",  # the parent's whole configuration, YAML
    "checkpoint",  # name of the parent's checkpoint
    "checkpoint_sha256",  # of that file
    "parent_sha256",  # of the weights themselves, see `parent_sha256`
    "feature_source",  # "res5" or "projected"
    "dataset",  # name of the split
    "categories",  # [{id, name, isthing}], in the ids of the statistics
    "num_images",
    "code_version",
)
DEFAULT_MEASURE = "PQ"  # of the quality; another is named in the provenance under the key "measure"


def _column(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_column("item", kind))


SCHEMA = pa.schema(
    [
        _column("image_id", pa.string()),
        _column("file_name", pa.string()),
        _column("height", pa.int32()),
        _column("width", pa.int32()),
        _column("quality", _list(pa.float64())),  # [E] q_k, higher is better
        _column("feature", _list(pa.float32())),  # [C] mean over the valid tokens
        _column("total_gflops", _list(pa.float64())),  # [E] of the whole model
        _column("encoder_gflops", _list(pa.float64())),  # [E]
        # the statistics of PQ, one entry per exit and category that occurs, ordered by exit and then category
        _column("stat_exit", _list(pa.int32())),
        _column("stat_category", _list(pa.int32())),
        _column("stat_iou", _list(pa.float64())),
        _column("stat_tp", _list(pa.int32())),
        _column("stat_fp", _list(pa.int32())),
        _column("stat_fn", _list(pa.int32())),
    ]
)
STATISTICS = ("stat_category", "stat_iou", "stat_tp", "stat_fp", "stat_fn")


class DerivedDatasetError(ValueError):
    """A derived dataset that cannot be used or gone on with: which, why, and what to do about it."""


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

    def __init__(self, directory: str | Path, provenance: Mapping, num_images: int, shard_size: int = 256):
        """provenance: `PROVENANCE_KEYS`, plain JSON values; num_images may be left out of it, "measure" put into it.

        Raises DerivedDatasetError if the directory holds a derived dataset of another provenance, and names the keys.
        """
        if num_images < 1 or shard_size < 1:
            raise ValueError(f"num_images and shard_size must be positive: {num_images}, {shard_size}")
        self.directory = Path(directory)
        self.manifest = _make_manifest({"num_images": num_images, **provenance}, num_images, shard_size)
        self.num_shards = -(-num_images // shard_size)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / MANIFEST).exists():
            with atomic_write(self.directory / MANIFEST, "w") as file:
                json.dump(self.manifest, file, indent=1, sort_keys=True)
        _check_same(_read_manifest(self.directory), self.manifest, self.directory)

    def indices(self, shard: int) -> range:
        """The images of a shard, as positions in the dataset's order."""
        return _shard_indices(self.manifest, shard)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """The shards that this process has to write; a damaged one counts, with a warning.

        Removes what a killed process left unfinished in these shards. Shards go to ranks by their number, so that
        ranks that start at different times never take the same one.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}: {rank}")
        missing = []
        for shard in range(rank, self.num_shards, world_size):
            path = _shard_path(self.directory, shard)
            for leftover in self.directory.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)
            if not path.exists():
                missing.append(shard)
            elif problem := _problem(path, self.manifest, shard):
                logger.warning("%s is written anew: %s", path, problem)
                missing.append(shard)
        return missing

    def write(self, shard: int, rows: Sequence[Mapping]) -> None:
        """Writes a shard whole or not at all. rows: see `make_row`, one for each of `indices(shard)`, in that order.

        Raises ValueError for a wrong number of rows, or a row that is incomplete or not finite.
        """
        expected = self.indices(shard)
        if len(rows) != len(expected):
            raise ValueError(f"shard {shard} has {len(expected)} images, {len(rows)} rows are given")
        for row in rows:
            _check_row(row, self.manifest["exits"])
        columns = {f.name: [row[f.name] for row in rows] for f in SCHEMA}
        metadata = {"eco_m2f": json.dumps({**self.manifest, "shard": shard}, sort_keys=True)}
        table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
        with atomic_write(_shard_path(self.directory, shard)) as file:
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
        manifest = _read_manifest(path)
        shards = range(-(-manifest["num_images"] // manifest["shard_size"]))
        absent = [s for s in shards if not _shard_path(path, s).exists()]
        if absent:
            raise DerivedDatasetError(
                f"{path} lacks {len(absent)} of {len(shards)} shards ({_abridged(absent)}): derive_dataset.py goes on"
            )
        return cls(**_join_shards(path, manifest, shards, with_features))

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
        category = self.category[entries]
        length = int(category.max(initial=-1)) + 1
        sums = [np.bincount(category, values[entries], length) for values in (self.iou, self.tp, self.fp, self.fn)]
        present = np.flatnonzero(sums[1] + sums[2] + sums[3])
        iou, *counts = (s[present] for s in sums)
        return ImageStatistics(present, iou, *(c.astype(np.int64) for c in counts))

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


def parent_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """The sha256 of weights: of names, dtypes, shapes and values, whatever the order and the file around them.

    Keys of the exit policy ("exit_policy.") do not count: they are not the parent's.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        if name.startswith("exit_policy."):
            continue
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the manifest ----------------------------------------------------------------------------------------------------


def _make_manifest(provenance: Mapping, num_images: int, shard_size: int) -> dict:
    lacking, unknown = set(PROVENANCE_KEYS) - set(provenance), set(provenance) - {*PROVENANCE_KEYS, "measure"}
    if lacking or unknown:
        raise ValueError(f"the provenance lacks {sorted(lacking)} and has unknown keys {sorted(unknown)}")
    if provenance["num_images"] != num_images:
        raise ValueError(f"the provenance says {provenance['num_images']} images, num_images is {num_images}")
    manifest = {"format": FORMAT, "shard_size": shard_size, **provenance}
    manifest["exits"] = list(check_exits(provenance["exits"]))
    return json.loads(json.dumps(manifest))  # as it will be read back: tuples are lists


def _read_manifest(directory: Path) -> dict:
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {str(directory)!r}: make a derived dataset with derive_dataset.py")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise DerivedDatasetError(f"{path} is of format {manifest.get('format')!r}, not {FORMAT}: derive it anew")
    return manifest


def _check_same(found: Mapping, wanted: Mapping, directory: Path) -> None:
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if different:
        changes = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(wanted.get(k))} now" for k in different)
        raise DerivedDatasetError(
            f"{directory} holds a derived dataset of another origin. Different are {changes}. "
            "Use another directory, or the same settings as before"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _abridged(shards: Sequence[int]) -> str:
    return ", ".join(map(str, shards[:10])) + (", ..." if len(shards) > 10 else "")


# --- shards ----------------------------------------------------------------------------------------------------------


def _shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05d}.parquet"


def _shard_indices(manifest: Mapping, shard: int) -> range:
    start = shard * manifest["shard_size"]
    if not 0 <= start < manifest["num_images"]:
        raise ValueError(
            f"no shard {shard}: there are {manifest['num_images']} images, {manifest['shard_size']} a shard"
        )
    return range(start, min(start + manifest["shard_size"], manifest["num_images"]))


def _check_row(row: Mapping, exits: Sequence[int]) -> None:
    name = row.get("image_id")
    if set(row) != set(SCHEMA.names):
        raise ValueError(f"the row of image {name!r} has the keys {sorted(row)}: build it with make_row")
    for key in ("quality", "total_gflops", "encoder_gflops"):
        if len(row[key]) != len(exits):
            raise ValueError(f"{key} of image {name!r} has {len(row[key])} values for the exits {list(exits)}")
    for key in ("quality", "feature", "total_gflops", "encoder_gflops", "stat_iou"):
        if not np.isfinite(row[key]).all():
            raise ValueError(f"{key} of image {name!r} is not finite: check the model's outputs for this image")
    unknown = set(np.asarray(row["stat_exit"]).tolist()) - set(exits)
    if unknown or len({len(row[key]) for key in ("stat_exit", *STATISTICS)}) != 1:
        raise ValueError(f"the statistics of image {name!r} differ in length or name exits {sorted(unknown)}")


def _read_shard(path: Path, manifest: Mapping, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Raises DerivedDatasetError if the shard is damaged or belongs to another dataset."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = json.loads(file.schema_arrow.metadata[b"eco_m2f"])
            table = file.read(columns=columns)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DerivedDatasetError(f"it is damaged ({str(error).splitlines()[0]})") from error
    if metadata != {**manifest, "shard": shard} or table.num_rows != len(_shard_indices(manifest, shard)):
        raise DerivedDatasetError("it belongs to another derived dataset")
    return table


def _problem(path: Path, manifest: Mapping, shard: int) -> str | None:
    try:
        _read_shard(path, manifest, shard)
    except DerivedDatasetError as error:
        return str(error)
    return None


def _join_shards(path: Path, manifest: Mapping, shards: Iterable[int], with_features: bool) -> dict:
    """The fields of a DerivedDataset. Features go straight to their place, so that they are in memory once."""
    num_images, exits = manifest["num_images"], manifest["exits"]
    columns = [name for name in SCHEMA.names if with_features or name != "feature"]
    features, parts = None, {name: [] for name in columns if name != "feature"}
    counts = []  # statistics of each image
    for shard in shards:
        try:
            table = _read_shard(_shard_path(path, shard), manifest, shard, columns)
        except DerivedDatasetError as error:
            remedy = "derive_dataset.py writes it anew"
            raise DerivedDatasetError(f"{_shard_path(path, shard)} cannot be used, {error}: {remedy}") from error
        for name in parts:
            column = table[name].combine_chunks()
            parts[name].append(column.flatten().to_numpy() if pa.types.is_list(column.type) else column.to_pylist())
        counts.append(table["stat_exit"].combine_chunks().value_lengths().to_numpy())
        if with_features:
            block = _matrix(table["feature"].combine_chunks().flatten().to_numpy(), table.num_rows)
            if features is None:
                features = np.empty((num_images, block.shape[1]), np.float32)
            features[_shard_indices(manifest, shard)] = block
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    _check_unique(joined["image_id"], path)
    return {
        "provenance": {key: manifest[key] for key in (*PROVENANCE_KEYS, "measure") if key in manifest},
        "image_ids": joined["image_id"].tolist(),
        "file_names": joined["file_name"].tolist(),
        "sizes": np.stack([joined["height"], joined["width"]], axis=1),
        "quality": _matrix(joined["quality"], num_images),
        "features": features,
        "total_gflops": _matrix(joined["total_gflops"], num_images),
        "encoder_gflops": _matrix(joined["encoder_gflops"], num_images),
        "statistics": _index_statistics(joined, np.concatenate(counts), exits),
    }


def _index_statistics(joined: Mapping[str, np.ndarray], counts: np.ndarray, exits: Sequence[int]) -> _SparseStatistics:
    image = np.repeat(np.arange(len(counts)), counts)
    slot = image * len(exits) + np.searchsorted(exits, joined["stat_exit"])
    if np.any(np.diff(slot) < 0):  # other writers may have another order
        order = np.argsort(slot, kind="stable")
        slot, joined = slot[order], {name: joined[name][order] for name in STATISTICS}
    offsets = np.concatenate([[0], np.cumsum(np.bincount(slot, minlength=len(counts) * len(exits)))])
    return _SparseStatistics(len(exits), offsets, *(joined[name] for name in STATISTICS))


def _matrix(flat: np.ndarray, rows: int) -> np.ndarray:
    return flat.reshape(rows, -1)


def _check_unique(image_ids: np.ndarray, path: Path) -> None:
    ids, counts = np.unique(image_ids, return_counts=True)
    if np.any(counts > 1):
        raise DerivedDatasetError(f"{path} holds images twice: {_abridged(ids[counts > 1].tolist())}; derive it anew")
