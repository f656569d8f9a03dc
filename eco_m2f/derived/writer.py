"""Writes a derived dataset, shard by shard, each whole or not at all."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..exits import check_exits
from ..files import atomic_write, remove_leftovers
from .schema import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    DerivedDatasetError,
    check_manifest,
    check_rows,
    column_digests,
    manifest_text,
    read_manifest,
    short,
)
from .shards import image_digests_of, problem, shard_indices, shard_path

logger = logging.getLogger(__name__)


class ShardWriter:
    """Writes a derived dataset shard by shard, from any number of processes. A stopped run can be continued.

    Shard s holds the images s * shard_size to (s + 1) * shard_size - 1 of the dataset's order. Every process opens the
    directory with the same arguments and writes the shards of `missing(rank, world_size)`:

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
        """provenance: `PROVENANCE_KEYS`, plain JSON values. num_images may be missing; keys of `OPTIONAL` may be added.
        images: positions in the dataset's order -> digests of these images, by kind. They show whether images change.

        Raises DerivedDatasetError for an invalid value, or if the directory holds a derived dataset of another
        provenance; the message names the different keys.
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
        """The shards that this process has to write. A damaged one counts as missing, with a warning.

        It also removes these shards' unfinished files of a killed process. A shard's number decides its rank, so two
        ranks never write the same shard.
        Raises DerivedDatasetError if the images of a finished shard have changed.
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
                logger.warning("%s is written again: %s", path, reason)
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
                "use another directory. If the change is intended, remove the shards made before it"
            )

    def write(self, shard: int, rows: Sequence[Mapping]) -> None:
        """Writes a shard whole or not at all. rows: see `make_row`, one for each of `indices(shard)`, in that order.

        Raises ValueError for a wrong number of rows, an incomplete row or an impossible value.
        """
        expected = self.indices(shard)
        if len(rows) != len(expected):
            raise ValueError(f"shard {shard} has {len(expected)} images, but {len(rows)} rows are given")
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
            # Without dictionaries, because such numbers hardly repeat. The checksums show a damaged page.
            pq.write_table(table, file, compression="zstd", use_dictionary=False, write_page_checksum=True)


def _make_manifest(provenance: Mapping, num_images: int, shard_size: int) -> dict:
    if provenance["num_images"] != num_images:
        raise ValueError(f"the provenance says {provenance['num_images']} images, but num_images is {num_images}")
    manifest = {"format": FORMAT, "shard_size": shard_size, **provenance}
    manifest["exits"] = list(check_exits(provenance["exits"]))
    manifest = json.loads(json.dumps(manifest))  # as it is read back: tuples become lists
    check_manifest(manifest)
    return manifest


def _check_same(found: Mapping, wanted: Mapping, directory: Path) -> None:
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if different:
        changes = "; ".join(f"{k}: {short(found.get(k))} there, {short(wanted.get(k))} now" for k in different)
        raise DerivedDatasetError(
            f"{directory} holds a derived dataset of another origin. These keys differ: {changes}. "
            "Use another directory, or the same settings as before"
        )
