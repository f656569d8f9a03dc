"""The format of a derived dataset's files, and the checks that they pass whenever they are read.

No file is trusted. The manifest and every column of a shard have a digest, which shows damage. The checks also find
impossible values, such as a quality above 1. Files of format v1 have no digests.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..exits import FEATURE_SOURCES, check_exits
from ..quality import QUALITY_REGISTRY

DEFAULT_QUALITY = "PQ"
QUALITY_KEY = "measure"  # of the quality's name; the default is not written
VIEWS = ("plain", "mirrored")  # of the images that the model saw
VIEW_KEY = "view"  # of the view's name; the plain one is not written
FORMAT = "eco_m2f.derived.v2"
FORMATS = (FORMAT, "eco_m2f.derived.v1")
MANIFEST = "manifest.json"
MOST_IMAGES = 2**31 - 1
ROUNDING = 1e-9  # tolerance of a quality and of a sum of IoU


class DerivedDatasetError(ValueError):
    """A derived dataset that cannot be used or continued. The message says which, why, and what to do."""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_IMAGES


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_exits(value: object) -> bool:
    try:
        return isinstance(value, list) and all(type(k) is int for k in value) and bool(check_exits(value))
    except ValueError:
        return False


def _are_categories(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(c, dict) for c in value):
        return False
    ids = [c.get("id") for c in value]
    whole = all(type(i) is int for i in ids) and len(set(ids)) == len(ids)
    return whole and all(_is_text(c.get("name", "")) and c.get("isthing", 0) in (0, 1) for c in value)


Check = tuple[Callable[[object], bool], str]  # whether a value is valid, and what it must be
TEXT: Check = (_is_text, "text")
COUNT: Check = (_is_count, f"a whole number from 1 to {MOST_IMAGES}")
SHA256: Check = (_is_sha256, "64 hexadecimal digits")
PROVENANCE: dict[str, Check] = {
    # layer numbers, the E columns of quality and of the costs
    "exits": (_are_exits, "layer numbers in increasing order"),
    "config": TEXT,  # the parent's whole configuration, YAML
    "checkpoint": TEXT,  # name of the parent's checkpoint file
    "checkpoint_sha256": SHA256,  # of that file
    "parent_sha256": SHA256,  # of its weights, see `checkpoint.parent_hash`
    "feature_source": (lambda value: value in FEATURE_SOURCES, f"one of {', '.join(FEATURE_SOURCES)}"),
    "dataset": TEXT,  # name of the split
    # with the ids that the statistics use
    "categories": (_are_categories, "a list of {id, name, isthing: 0 or 1}, each id once"),
    "num_images": COUNT,
    "code_version": TEXT,
}
OPTIONAL: dict[str, Check] = {
    QUALITY_KEY: TEXT,
    VIEW_KEY: (lambda value: value in VIEWS[1:], f"one of {', '.join(VIEWS[1:])}"),  # of the images
    "annotation_sha256": SHA256,  # of the split's annotation
}
PROVENANCE_KEYS = tuple(PROVENANCE)
PROVENANCE_AND_OPTIONAL = (*PROVENANCE_KEYS, *OPTIONAL)


def named_in_provenance(name: str) -> dict[str, str]:
    """The part of the provenance that names the quality."""
    return {} if name == DEFAULT_QUALITY else {QUALITY_KEY: name}


def view_in_provenance(view: str) -> dict[str, str]:
    """The part of the provenance that names the view. Raises ValueError for an unknown view."""
    if view not in VIEWS:
        raise ValueError(f"the view is {view!r}, but must be one of {', '.join(VIEWS)}")
    return {} if view == VIEWS[0] else {VIEW_KEY: view}


def quality_name(provenance: Mapping) -> str:
    """The name of the quality, such as "PQ"."""
    return provenance.get(QUALITY_KEY, DEFAULT_QUALITY)


def manifest_text(manifest: Mapping) -> str:
    """The content of the manifest file, with its digest."""
    return json.dumps({**manifest, "sha256": _manifest_digest(manifest)}, indent=1, sort_keys=True)


def _manifest_digest(manifest: Mapping) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict:
    """The checked manifest, without its digest. Raises FileNotFoundError or DerivedDatasetError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {str(directory)!r}: make a derived dataset with derive_dataset.py")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DerivedDatasetError(f"{path} is no JSON ({error}): restore it, or derive the dataset again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in FORMATS:
        raise DerivedDatasetError(f"{path} has the format {version!r}, not {FORMAT}: derive it again")
    digest = manifest.pop("sha256", None)
    if version == FORMAT and digest != _manifest_digest(manifest):
        raise DerivedDatasetError(f"{path} was changed after it was written: restore it, or derive the dataset again")
    try:
        check_manifest(manifest)
    except DerivedDatasetError as error:
        raise DerivedDatasetError(f"{path} cannot be used, {error}: restore it, or derive the dataset again") from error
    return manifest


def check_manifest(manifest: Mapping) -> None:
    """Raises DerivedDatasetError for a missing key, an unknown key or an invalid value."""
    checks = {**PROVENANCE, **OPTIONAL, "shard_size": COUNT, "format": TEXT}
    lacking, unknown = checks.keys() - OPTIONAL - manifest.keys(), manifest.keys() - checks.keys()
    if lacking or unknown:
        raise DerivedDatasetError(f"the provenance lacks {sorted(lacking)} and has unknown keys {sorted(unknown)}")
    for key, value in manifest.items():
        passes, wanted = checks[key]
        if not passes(value):
            raise DerivedDatasetError(f"{key} is {short(value)}, but must be {wanted}")


def short(value: object) -> str:
    """The value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


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
        # The statistics of the quality, if it has any: one entry per exit and category that occurs, sorted by both.
        _column("stat_exit", _list(pa.int32())),
        _column("stat_category", _list(pa.int32())),
        _column("stat_iou", _list(pa.float64())),
        _column("stat_tp", _list(pa.int32())),
        _column("stat_fp", _list(pa.int32())),
        _column("stat_fn", _list(pa.int32())),
    ]
)
STATISTICS = ("stat_category", "stat_iou", "stat_tp", "stat_fp", "stat_fn")
PER_EXIT = ("quality", "total_gflops", "encoder_gflops")


def values_of(table: pa.Table, name: str) -> np.ndarray:
    """All values of a column. Lists are concatenated."""
    column = table[name].combine_chunks()
    return (column.flatten() if pa.types.is_list(column.type) else column).to_numpy(zero_copy_only=False)


def lengths_of(table: pa.Table, name: str) -> np.ndarray:
    """The length of each row's list."""
    return table[name].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def column_digests(table: pa.Table) -> dict[str, str]:
    """{column: sha256 of its values and, for lists, of their lengths}."""
    digests = {}
    for field in table.schema:
        digest = hashlib.sha256()
        if pa.types.is_string(field.type):
            digest.update(json.dumps(table[field.name].to_pylist()).encode())
        else:
            digest.update(np.ascontiguousarray(values_of(table, field.name)))
        if pa.types.is_list(field.type):
            digest.update(np.ascontiguousarray(lengths_of(table, field.name)))
        digests[field.name] = digest.hexdigest()
    return digests


def check_columns(table: pa.Table) -> None:
    """Raises DerivedDatasetError if a column has another type than in `SCHEMA`, or lacks a value."""
    for field in table.schema:
        wanted = SCHEMA.field(field.name).type
        item, wanted_item = (kind.value_type if pa.types.is_list(kind) else kind for kind in (field.type, wanted))
        if item != wanted_item or pa.types.is_list(field.type) != pa.types.is_list(wanted):
            raise DerivedDatasetError(f"column {field.name} is {field.type}, but must be {wanted}")
        column = table[field.name].combine_chunks()
        column.validate(full=True)
        if column.null_count or (pa.types.is_list(wanted) and column.flatten().null_count):
            raise DerivedDatasetError(f"column {field.name} lacks values")


def check_rows(table: pa.Table, manifest: Mapping, channels: int | None = None) -> None:
    """Raises DerivedDatasetError for an impossible value; the message names row, image, column and value.

    table: any columns of `SCHEMA`, with its types. channels: the length of every feature; by default the first's.
    """
    names = set(table.column_names)
    for name in (n for n in PER_EXIT if n in names):
        _check_lengths(table, name, np.full(table.num_rows, len(manifest["exits"])))
    if "feature" in names and table.num_rows:
        channels = max(1, int(lengths_of(table, "feature")[0])) if channels is None else channels
        _check_lengths(table, "feature", np.full(table.num_rows, channels))
    for name in (n for n in STATISTICS if n in names):
        _check_lengths(table, name, lengths_of(table, "stat_exit"))
    for name, (passes, wanted) in _value_checks(manifest).items():
        if name in names:
            values = values_of(table, name)
            _refuse(table, name, ~passes(values), values, wanted)
    if "stat_category" in names and len(values_of(table, "stat_category")):
        _check_categories(manifest)
    if {"stat_iou", "stat_tp", "stat_exit"} <= names:
        iou = values_of(table, "stat_iou")
        _refuse(table, "stat_iou", iou > values_of(table, "stat_tp") + ROUNDING, iou, "at most the number of matches")
        _check_entries_are_different(table)


def _check_categories(manifest: Mapping) -> None:
    """Raises DerivedDatasetError if a category lacks a key that the quality's statistics need."""
    name = quality_name(manifest)
    wanted = next((member.category_keys for _, member in QUALITY_REGISTRY if member.name == name), ())
    for category, key in itertools.product(manifest["categories"], wanted):
        if key not in category:
            raise DerivedDatasetError(f"it has statistics of {name}, but category {category['id']} lacks {key}")


def _value_checks(manifest: Mapping) -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]]:
    """{column: (which of its values are valid, what they must be)}."""
    positive = (lambda v: v > 0, "positive")
    count = (lambda v: v >= 0, "0 or more")
    cost = (lambda v: (v >= 0) & np.isfinite(v), "a finite number, 0 or more")
    exits, categories = manifest["exits"], [c["id"] for c in manifest["categories"]]
    return {
        "height": positive,
        "width": positive,
        "quality": (lambda v: (v >= 0) & (v <= 1 + ROUNDING), "a number from 0 to 1"),
        "feature": (np.isfinite, "finite"),
        "total_gflops": cost,
        "encoder_gflops": cost,
        "stat_exit": (lambda v: np.isin(v, exits), f"one of the exits {exits}"),
        "stat_category": (lambda v: np.isin(v, categories), "the id of a category of the manifest"),
        "stat_iou": cost,
        "stat_tp": count,
        "stat_fp": count,
        "stat_fn": count,
    }


def _check_lengths(table: pa.Table, name: str, wanted: np.ndarray) -> None:
    lengths = lengths_of(table, name)
    if np.any(lengths != wanted):
        row = int(np.argmax(lengths != wanted))
        raise DerivedDatasetError(
            f"{_row_name(table, row)}: {name} has {lengths[row]} values, but must be {wanted[row]}"
        )


def _refuse(table: pa.Table, name: str, wrong: np.ndarray, values: np.ndarray, wanted: str) -> None:
    if np.any(wrong):
        entry = row = int(np.argmax(wrong))
        if pa.types.is_list(table.schema.field(name).type):
            row = int(np.searchsorted(np.cumsum(lengths_of(table, name)), entry, side="right"))
        raise DerivedDatasetError(f"{_row_name(table, row)}: {name} is {values[entry]}, but must be {wanted}")


def _check_entries_are_different(table: pa.Table) -> None:
    """Raises DerivedDatasetError if a row has two entries of one exit and category: they would count twice."""
    row = np.repeat(np.arange(table.num_rows), lengths_of(table, "stat_exit"))
    entries = np.stack([row, values_of(table, "stat_exit"), values_of(table, "stat_category")])
    order = np.lexsort(entries[::-1])
    again = np.flatnonzero((np.diff(entries[:, order]) == 0).all(axis=0))
    if len(again):
        i, k, category = entries[:, order[again[0]]]
        raise DerivedDatasetError(
            f"{_row_name(table, int(i))}: the statistics hold exit {k}, category {category} twice"
        )


def _row_name(table: pa.Table, row: int) -> str:
    image = f" (image {table['image_id'][row].as_py()!r})" if "image_id" in table.column_names else ""
    return f"row {row}{image}"
