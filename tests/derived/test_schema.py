"""Impossible values in a derived dataset are refused with file, row and value. Damage is always found."""

import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from derived_at_random import CATEGORIES, ROWS, make_provenance, write
from fuzzing import damaged, tries
from mutate import other_values, outcome

from eco_m2f.derived import MANIFEST, DerivedDatasetError
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.derived.schema import FORMATS, SCHEMA, read_manifest
from eco_m2f.derived.writer import ShardWriter

SHARD = "shard-00002.parquet"  # the images 10 to 14


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path)
    return tmp_path


def as_first_format(folder: Path, change=lambda columns: None, schema: pa.Schema = SCHEMA) -> None:
    """Rewrites a derived dataset in the format without digests. change: applied to the columns of SHARD."""
    manifest = {**read_manifest(folder), "format": FORMATS[1]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"eco_m2f"])
        columns = table.to_pydict()
        if path.name == SHARD:
            change(columns)
        schema_of = schema if path.name == SHARD else SCHEMA
        changed = pa.table({f.name: columns[f.name] for f in schema_of}, schema=schema_of)
        changed = changed.replace_schema_metadata({"eco_m2f": json.dumps({**about, "format": FORMATS[1]})})
        pq.write_table(changed, path, use_dictionary=False)


def setting(name: str, row: int, value):
    """A change of one row's value; in a list, of entry 1."""

    def change(columns: dict) -> None:
        if isinstance(columns[name][row], list) and not isinstance(value, list):
            columns[name][row][0] = value
        else:
            columns[name][row] = value

    return change


def with_entry(row: int, **entry):
    """A change that gives a row only one entry of statistics."""

    def change(columns: dict) -> None:
        for name, value in {"exit": 2, "category": 1, "iou": 0.9, "tp": 1, "fp": 0, "fn": 0, **entry}.items():
            columns[f"stat_{name}"][row] = value if isinstance(value, list) else [value]

    return change


def ragged(columns: dict) -> None:
    """The number of values is right, but a row has one more and the next one fewer."""
    columns["quality"][1].append(columns["quality"][2].pop(0))


WRONG = {
    "row 1 .image '111'.: quality is nan, but must be a number from 0 to 1": setting("quality", 1, math.nan),
    "row 0 .image '110'.: quality is 1.5": setting("quality", 0, 1.5),
    "row 4 .image '114'.: quality is -0.1": setting("quality", 4, -0.1),
    "row 1 .image '111'.: quality has 4 values, but must be 3": ragged,
    "row 2 .image '112'.: feature is inf": setting("feature", 2, math.inf),
    "row 3 .image '113'.: feature has 3 values, but must be 4": setting("feature", 3, [0.0] * 3),
    "row 3 .image '113'.: total_gflops is -1.0, but must be a finite": setting("total_gflops", 3, -1.0),
    "row 3 .image '113'.: encoder_gflops is inf": setting("encoder_gflops", 3, math.inf),
    "row 2 .image '112'.: height is 0, but must be positive": setting("height", 2, 0),
    "row 2 .image '112'.: width is -5": setting("width", 2, -5),
    "row 1 .image '111'.: stat_exit is 4, but must be one of the exits .2, 3, 6": with_entry(1, exit=4),
    "row 1 .image '111'.: stat_category is 99": with_entry(1, category=99),
    "row 1 .image '111'.: stat_tp is -1, but must be 0 or more": with_entry(1, tp=-1, iou=0.0),
    "row 1 .image '111'.: stat_fp is -2": with_entry(1, fp=-2),
    "row 1 .image '111'.: stat_fn is -3": with_entry(1, fn=-3),
    "row 1 .image '111'.: stat_iou is 1.2, but must be at most": with_entry(1, iou=1.2),
    "row 1 .image '111'.: stat_iou is nan": with_entry(1, iou=math.nan),
    "row 1 .image '111'.: stat_tp has 2 values, but must be 1": with_entry(1, tp=[1, 1]),
    "row 1 .image '111'.: the statistics hold exit 2, category 1 twice": with_entry(
        1, exit=[2, 2], category=[1, 1], iou=[0.9, 0.9], tp=[1, 1], fp=[0, 0], fn=[0, 0]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_no_image_can_have_is_refused_by_shard_row_and_value(folder, message):
    as_first_format(folder, WRONG[message])
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} cannot be used, {message}.*derive the dataset again"):
        DerivedDataset.load(folder)


def test_a_shard_that_is_no_file_is_not_waited_for(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} cannot be used, it is not a regular file"):
        DerivedDataset.load(folder)


def test_a_shard_that_unpacks_to_far_more_than_it_is_is_refused_unread(folder):
    def inflate(columns: dict) -> None:
        columns["feature"] = [np.zeros(10**7 // 5, np.float32)] * 5

    as_first_format(folder, inflate)
    pq.write_table(pq.read_table(folder / SHARD), folder / SHARD, compression="zstd")
    assert (folder / SHARD).stat().st_size < 10**6
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} cannot be used, it says to unpack to .* bytes, far more"):
        DerivedDataset.load(folder)


def test_statistics_of_categories_without_a_kind_are_refused(folder):
    as_first_format(folder)
    manifest = read_manifest(folder)
    del manifest["categories"][1]["isthing"]
    _with_manifest(folder, manifest)
    with pytest.raises(DerivedDatasetError, match="has statistics of PQ, but category 2 lacks isthing"):
        DerivedDataset.load(folder)


def test_another_quality_needs_no_kinds(tmp_path):
    """mIoU needs only classes. Class maps have no more."""
    plain = [{k: c[k] for k in ("id", "name")} for c in CATEGORIES]
    write(tmp_path, measure="mIoU", categories=plain)
    data = DerivedDataset.load(tmp_path)
    assert data.quality_name == "mIoU" and 0 < data.exact_quality([2] * len(data))["miou"] < 1
    with pytest.raises(DerivedDatasetError, match="has statistics of PQ, but category 1 lacks isthing"):
        write(tmp_path / "pq", categories=plain)


def test_the_largest_category_id_costs_no_memory(folder):
    as_first_format(folder, with_entry(1, category=2**31 - 1))
    manifest = read_manifest(folder)
    manifest["categories"].append({"id": 2**31 - 1, "name": "last", "isthing": 1})
    _with_manifest(folder, manifest)
    tracemalloc.start()
    data = DerivedDataset.load(folder)
    assert 0 < data.exact_quality([2] * len(data))["pq"] < 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**8


def _with_manifest(folder: Path, manifest: dict) -> None:
    """Writes a manifest of the first format, also into the shards."""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        about = {**manifest, "shard": json.loads(table.schema.metadata[b"eco_m2f"])["shard"]}
        pq.write_table(table.replace_schema_metadata({"eco_m2f": json.dumps(about)}), path, use_dictionary=False)


def test_the_first_format_is_still_read_and_not_written(folder):
    before = DerivedDataset.load(folder)
    as_first_format(folder)
    old = DerivedDataset.load(folder)
    assert np.array_equal(old.quality, before.quality) and np.array_equal(old.features, before.features)
    assert old.exact_quality([3] * len(old)) == before.exact_quality([3] * len(old))
    with pytest.raises(DerivedDatasetError, match="format: 'eco_m2f.derived.v1' there, 'eco_m2f.derived.v2' now"):
        write(folder)


def test_features_of_one_width_in_a_shard_and_another_in_the_next(folder):
    def widen(columns: dict) -> None:
        columns["feature"] = [[0.0] * 7 for _ in columns["feature"]]

    as_first_format(folder, widen)
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} .*row 0 .*: feature has 7 values, but must be 4"):
        DerivedDataset.load(folder)
    assert DerivedDataset.load(folder, with_features=False).features is None


@pytest.mark.parametrize("name, kind", [("height", pa.float64()), ("quality", pa.list_(pa.string())), ("width", None)])
def test_columns_of_another_type_are_refused(folder, name, kind):
    fields = [f if f.name != name else pa.field(name, kind) for f in SCHEMA if f.name != name or kind]

    def change(columns: dict) -> None:
        if name == "quality":
            columns[name] = [[str(v) for v in row] for row in columns[name]]

    as_first_format(folder, change, pa.schema(fields))
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} cannot be used, .*column"):
        DerivedDataset.load(folder)


def test_values_that_are_missing_are_refused(folder):
    nullable = pa.schema([pa.field(f.name, pa.list_(pa.float64()) if f.name == "quality" else f.type) for f in SCHEMA])
    as_first_format(folder, setting("quality", 0, [None, 0.1, 0.2]), nullable)
    with pytest.raises(DerivedDatasetError, match=f"{SHARD} cannot be used, column quality lacks values"):
        DerivedDataset.load(folder)


@pytest.mark.parametrize("version", FORMATS)
def test_every_wrong_value_of_the_manifest_is_refused_by_name(folder, version):
    """The older format has no digest. Its wrong values are found by their types, or because the shards repeat them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if version != manifest["format"]:
        as_first_format(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
    for changed in other_values({**manifest, "categories": CATEGORIES[:1]}):
        try:
            (folder / MANIFEST).write_text(json.dumps(changed))
            DerivedDataset.load(folder)
        except DerivedDatasetError as error:
            assert MANIFEST in str(error) or "shard-00000" in str(error) or "shards (" in str(error)
        else:
            pytest.fail(f"taken for sound: {changed}")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff{}", b'{"format": []}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused_by_name(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DerivedDatasetError, match=MANIFEST):
        DerivedDataset.load(folder)


def test_a_manifest_of_very_many_images_is_refused_at_once(folder):
    as_first_format(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "num_images": 2**31 - 1, "shard_size": 1}))
    with pytest.raises(DerivedDatasetError, match="lacks 2147483642 of 2147483647 shards .5, 6, "):
        DerivedDataset.load(folder)


@pytest.mark.parametrize(
    "changes", [{"parent_sha256": "x"}, {"feature_source": "res4"}, {"dataset": 3}, {"categories": [{"id": "1"}]}]
)
def test_a_provenance_that_cannot_be_is_not_written(tmp_path, changes):
    with pytest.raises(DerivedDatasetError, match=f"{next(iter(changes))} is .*, but must be"):
        ShardWriter(tmp_path, make_provenance(**changes), len(ROWS))
    assert not list(tmp_path.iterdir())


def same(a: DerivedDataset, b: DerivedDataset) -> bool:
    arrays = ("sizes", "quality", "features", "total_gflops", "encoder_gflops")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    sums = all(np.array_equal(getattr(a.statistics, n), getattr(b.statistics, n)) for n in ("category", "iou", "tp"))
    names = (a.image_ids, a.file_names, a.provenance) == (b.image_ids, b.file_names, b.provenance)
    return equal and sums and names


@pytest.mark.parametrize("name, count", [(MANIFEST, 200), (SHARD, 350)])
def test_fuzz_damage_shows_or_does_no_harm(folder, name, count):
    sound = DerivedDataset.load(folder)

    def load(path: Path) -> DerivedDataset:
        return DerivedDataset.load(path.parent)

    found = [outcome(load, folder / name, bad) for bad in damaged((folder / name).read_bytes(), tries(count))]
    assert all(loaded is None or same(loaded, sound) for loaded in found)
    assert 2 * found.count(None) > len(found)


def test_images_that_have_changed_since_a_shard_was_written_are_refused(tmp_path):
    content = {i: "as it was" for i in range(len(ROWS))}

    def writer(**kinds) -> ShardWriter:
        def digests(indices):
            return {kind: "".join(content[i] for i in indices) for kind in kinds or {"sizes": 0}}

        return ShardWriter(tmp_path, make_provenance(), len(ROWS), 5, digests)

    first = writer()
    for shard in (0, 2):
        first.write(shard, [ROWS[i] for i in first.indices(shard)])
    assert writer().missing() == [1, 3, 4]
    content[6] = "another"  # of shard 1, which is not yet written
    assert writer().missing() == [1, 3, 4] and writer(contents=0).missing() == [1, 3, 4]
    content[11] = "another"
    with pytest.raises(DerivedDatasetError, match=f"the images of .*{SHARD} have changed .*sizes.*restore them"):
        writer(contents=0, sizes=0).missing()
    assert writer(contents=0).missing() == [1, 3, 4]  # the existing shards do not have this digest
    (tmp_path / SHARD).unlink()
    assert writer().missing() == [1, 2, 3, 4]
