"""Reads the shards of a derived dataset, which are Parquet files, and checks them by `schema.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .schema import (
    FORMAT,
    SCHEMA,
    DerivedDatasetError,
    check_columns,
    check_rows,
    column_digests,
    lengths_of,
    values_of,
)

LARGEST_FACTOR, LARGEST_REST = 64, 2**26  # limit of a shard's unpacked size: FACTOR * size + REST; zeros pack well
METADATA = (b"eco_m2f", b"sha256", b"images")  # manifest and shard number; digests of columns; digests of images


def shard_path(directory: Path, shard: int) -> Path:
    """The file of a shard."""
    return directory / f"shard-{shard:05d}.parquet"


def present_shards(directory: Path) -> set[int]:
    """The numbers of the shards whose files exist, whole or not."""
    numbers = (p.stem.removeprefix("shard-") for p in directory.glob("shard-*.parquet"))
    return {int(number) for number in numbers if number.isdecimal()}


def shard_indices(manifest: Mapping, shard: int) -> range:
    """The images of a shard, as positions in the dataset's order. Raises ValueError if there is no such shard."""
    start = shard * manifest["shard_size"]
    if not 0 <= start < manifest["num_images"]:
        raise ValueError(
            f"no shard {shard}: there are {manifest['num_images']} images, {manifest['shard_size']} a shard"
        )
    return range(start, min(start + manifest["shard_size"], manifest["num_images"]))


def read_shard(
    path: Path,
    manifest: Mapping,
    shard: int,
    columns: Sequence[str] | None = None,
    channels: int | None = None,
) -> pa.Table:
    """Reads a shard, or only these columns of it. channels: the length of every feature, see `check_rows`.

    Raises DerivedDatasetError if it is damaged, belongs to another dataset, or holds an impossible value.
    """
    try:
        if not path.is_file():  # a pipe never ends
            raise DerivedDatasetError("it is not a regular file")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_amount(file.metadata, path.stat().st_size, len(shard_indices(manifest, shard)))
            metadata = {k: json.loads(v) for k, v in file.schema_arrow.metadata.items() if k in METADATA}
            written = dict(metadata.get(b"sha256", {}))
            table = file.read(columns=columns)
        if sorted(table.column_names) != sorted(columns or SCHEMA.names):
            raise DerivedDatasetError(f"it has the columns {', '.join(table.column_names)}")
        check_columns(table)
        digests = column_digests(table)
    except DerivedDatasetError:
        raise
    except Exception as error:  # a broken file can make the reader raise anything
        raise DerivedDatasetError(f"it is damaged ({_first_line(error)})") from error
    written = written if written or manifest["format"] == FORMAT else digests  # the older format has none
    if damaged := [name for name, digest in digests.items() if written.get(name) != digest]:
        raise DerivedDatasetError(f"it is damaged (columns {', '.join(damaged)} differ from what was written)")
    expected = len(shard_indices(manifest, shard))
    if metadata.get(b"eco_m2f") != {**manifest, "shard": shard} or table.num_rows != expected:
        raise DerivedDatasetError("it belongs to another derived dataset")
    check_rows(table, manifest, channels)
    return table


def _check_amount(about: pq.FileMetaData, size: int, rows: int) -> None:
    """Raises DerivedDatasetError if the shard's metadata state other rows, or far more data than the file's size."""
    if about.num_rows != rows:
        raise DerivedDatasetError("it belongs to another derived dataset")
    chunks = (about.row_group(g).column(c) for g in range(about.num_row_groups) for c in range(about.num_columns))
    unpacked = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)
    if unpacked > LARGEST_FACTOR * size + LARGEST_REST:
        raise DerivedDatasetError(f"it says to unpack to {unpacked} bytes, far more than its own {size}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def problem(path: Path, manifest: Mapping, shard: int) -> str | None:
    """Why a shard cannot be used; None if it can."""
    try:
        read_shard(path, manifest, shard)
    except DerivedDatasetError as error:
        return str(error)
    return None


def image_digests_of(path: Path) -> dict[str, str]:
    """The digests of a valid shard's images that `ShardWriter` stored, by kind; {} if it stored none."""
    return json.loads(pq.read_schema(path).metadata.get(b"images", b"{}"))


def join_shards(
    directory: Path, manifest: Mapping, shards: Sequence[int], with_features: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """The columns of all shards, the number of statistics of each image, and the features [N, C] if wanted.

    Features are written in place, so that they are in memory only once. Raises DerivedDatasetError.
    """
    columns = [name for name in SCHEMA.names if with_features or name != "feature"]
    features, parts, counts = None, {name: [] for name in columns if name != "feature"}, []
    for shard in shards:
        channels = None if features is None else features.shape[1]
        table = _read_usable_shard(shard_path(directory, shard), manifest, shard, columns, channels)
        for name in parts:
            text = pa.types.is_string(SCHEMA.field(name).type)
            parts[name].append(table[name].to_pylist() if text else values_of(table, name))
        counts.append(lengths_of(table, "stat_exit"))
        if with_features:
            block = values_of(table, "feature").reshape(table.num_rows, -1)
            if features is None:
                features = np.empty((manifest["num_images"], block.shape[1]), np.float32)
            features[shard_indices(manifest, shard)] = block
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    _check_unique(joined["image_id"], directory)
    return joined, np.concatenate(counts), features


def _read_usable_shard(
    path: Path, manifest: Mapping, shard: int, columns: Sequence[str], channels: int | None
) -> pa.Table:
    """Like `read_shard`, but the error names the file and the remedy."""
    try:
        return read_shard(path, manifest, shard, columns, channels)
    except DerivedDatasetError as error:
        again = manifest["format"] == FORMAT
        remedy = "run derive_dataset.py again to rewrite it" if again else "derive the dataset again, in another folder"
        raise DerivedDatasetError(f"{path} cannot be used, {error}: {remedy}") from error


def _check_unique(image_ids: np.ndarray, path: Path) -> None:
    ids, counts = np.unique(image_ids, return_counts=True)
    if np.any(counts > 1):
        raise DerivedDatasetError(f"{path} holds images twice: {abridged(ids[counts > 1].tolist())}; derive it again")


def abridged(numbers: Sequence) -> str:
    """The first ten numbers, for a message."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
