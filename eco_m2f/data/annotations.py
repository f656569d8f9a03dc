"""The only reader of a dataset's JSON. Training, Step B, evaluation and the checker all use it.

    content = read("annotations/panoptic_val.json", PANOPTIC)    # every field is valid, or a DataError
    content, findings = examine(path, PANOPTIC)                  # the valid entries, and everything that is wrong

It checks each field against the schema (`schema.py`). Then it checks what the schema cannot: duplicate ids, images
without an entry, undeclared categories, files outside their folder.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..files import open_regular
from .panoptic_map import DataError
from .schema import (
    DETECTION,
    INSTANCES,
    PANOPTIC,
    REMEDIES,
    REMEDY,
    Category,
    Content,
    DetectionContent,
    Kind,
    PanopticAnnotation,
    PanopticContent,
)

SECTIONS = ("images", "annotations", "categories")
BOM = b"\xef\xbb\xbf"
CITYSCAPES = "cityscapes_panoptic_seg"  # detectron2's evaluator_type
ADVICE = "tools/check_dataset.py lists everything that is wrong"


@dataclass(frozen=True, order=True)
class Finding:
    """One fault: its kind (a short constant phrase), the file or id it concerns, and the remedy."""

    kind: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}; {self.remedy}"


def read(json_file: str | Path, kind: Kind, outside: bool = False) -> Any:
    """The file's content, an instance of `kind.content`.

    outside: let file names leave the folder of the images or of the PNGs.
    Raises DataError, which names the file, entry, field, value and remedy of the first fault.
    """
    content, findings = examine(json_file, kind, outside)
    if findings:
        more = f" ({len(findings)} findings in all; {ADVICE})" if len(findings) > 1 else ""
        raise DataError(f"{json_file}: {findings[0]}{more}")
    return content


def examine(json_file: str | Path, kind: Kind, outside: bool = False) -> tuple[Any, list[Finding]]:
    """The valid entries of a file, and what is wrong with the others. Arguments as of `read`.

    Raises DataError if the file is missing, no JSON, or in another format.
    """
    data = _bytes(json_file, kind)
    try:
        content, findings, lost = msgspec.json.decode(data, type=kind.content), [], set()
    except msgspec.ValidationError:
        content, findings, lost = _entry_by_entry(_parsed(json_file, data), kind, json_file)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(_no_json(json_file, error)) from error
    return content, findings + list(_contradictions(content, kind, outside, lost))


def read_categories(json_file: str | Path, kind: Kind) -> list[Category]:
    """The checked categories alone. This is faster, and other sections may be wrong. Raises DataError."""
    data = _bytes(json_file, kind)
    rest = [(section, msgspec.Raw) for section in ("images", "annotations")]
    layout = msgspec.defstruct("Categories", [*rest, ("categories", list[kind.category])])
    try:
        categories = msgspec.json.decode(data, type=layout).categories
    except msgspec.ValidationError as error:
        content, findings, _ = _entry_by_entry(_parsed(json_file, data), kind, json_file)
        for finding in findings:
            if "categor" in finding.kind:
                raise DataError(f"{json_file}: {finding}") from error
        categories = content.categories
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(_no_json(json_file, error)) from error
    for finding in _check_categories(categories):
        raise DataError(f"{json_file}: {finding}")
    return categories


def kind_of(metadata) -> Kind:
    """The kind of a registered dataset's JSON: panoptic or detection."""
    return PANOPTIC if getattr(metadata, "panoptic_json", None) else DETECTION


def read_registered(metadata) -> Any:
    """Reads the main JSON of a registered dataset, see `read`."""
    kind = kind_of(metadata)
    json_file = metadata.panoptic_json if kind is PANOPTIC else metadata.json_file
    return read(json_file, kind, getattr(metadata, "outside", False))


def image_file(metadata, image) -> str:
    """The path of a registered dataset's image. Cityscapes has a folder per city; its images are named by id."""
    if getattr(metadata, "evaluator_type", None) == CITYSCAPES:
        return os.path.join(metadata.image_root, str(image.id).split("_")[0], f"{image.id}_leftImg8bit.png")
    return os.path.join(metadata.image_root, image.file_name)


def class_map_file(metadata, image, annotation: PanopticAnnotation) -> str | None:
    """The path of an image's class map; None if the dataset has none."""
    if getattr(metadata, "evaluator_type", None) == CITYSCAPES:
        return os.path.join(metadata.gt_dir, str(image.id).split("_")[0], f"{image.id}_gtFine_labelTrainIds.png")
    root = getattr(metadata, "sem_seg_root", None)
    return os.path.join(root, annotation.file_name) if root else None


def leaves_folder(file_name: str) -> bool:
    """Whether a path leaves its folder: it is absolute, has a drive, or contains `..`."""
    parts = file_name.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or parts[0] == "~" or (len(parts[0]) == 2 and parts[0][1] == ":")


def _bytes(json_file: str | Path, kind: Kind) -> bytes:
    try:
        with open_regular(json_file) as file:
            return file.read().removeprefix(BOM)
    except FileNotFoundError as error:
        raise DataError(
            f"{json_file}: {kind.name} JSON not found; datasets/README.md shows where each dataset's files belong "
            "(the root is $DETECTRON2_DATASETS, ./datasets if unset)"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{json_file}: not a readable JSON file ({error})") from error


def _parsed(json_file: str | Path, data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(_no_json(json_file, error)) from error


def _no_json(json_file: str | Path, error: Exception) -> str:
    return (
        f"{json_file}: not a readable JSON file ({error}). It must be UTF-8 and complete, without NaN and Infinity. "
        "Restore it, or write it again"
    )


def _entry_by_entry(raw: Any, kind: Kind, json_file: str | Path) -> tuple[Any, list[Finding], set]:
    """The valid entries of a faulty file, the findings, and (list, id as text) of each entry left out.

    Raises DataError if the file is in another format.
    """
    _raise_unless_of_kind(raw, kind, json_file)
    kept: dict[str, list] = {}
    findings, lost = [], set()
    for section in SECTIONS:
        kept[section] = []
        for i, entry in enumerate(raw[section]):
            try:
                kept[section].append(msgspec.convert(_whole(entry), kind.entry(section)))
            except msgspec.ValidationError as error:
                findings.append(_explained(error, section, i, entry))
                lost.add((section, str(entry.get("id")) if isinstance(entry, dict) else ""))
    return kind.content(**kept), findings, lost


def _whole(value: Any) -> Any:
    """The value with 96 for 96.0, where that is exact. Tables export whole numbers that way."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 53 else value
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return {k: _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def _raise_unless_of_kind(raw: Any, kind: Kind, json_file: str | Path) -> None:
    wrong_kind = f"{json_file}: not in COCO {kind.name} format"
    if not isinstance(raw, dict):
        raise DataError(f"{wrong_kind}, it holds a {_type(raw)}, not an object")
    if missing := [key for key in SECTIONS if key not in raw]:
        raise DataError(f"{wrong_kind}, it lacks {missing}; {REMEDY}")
    if wrong := [key for key in SECTIONS if not isinstance(raw[key], list)]:
        raise DataError(f"{wrong_kind}, its {wrong[0]!r} must be a list, not {_type(raw[wrong[0]])}; {REMEDY}")
    entries = [a for a in raw["annotations"] if isinstance(a, dict)]
    panoptic = any("segments_info" in a for a in entries)
    if kind is PANOPTIC and not panoptic and any("bbox" in a or "segmentation" in a for a in entries):
        raise DataError(
            f"{wrong_kind}: it is a detection or instance JSON, each annotation one object. For DETR, give it as "
            "boxes=; next to a panoptic JSON, as instances=. json= is the panoptic JSON, with segments_info and PNGs"
        )
    if kind is not PANOPTIC and panoptic:
        key = "boxes" if kind is DETECTION else "instances"
        raise DataError(f"{wrong_kind}: it is a panoptic JSON, with segments_info. Give it as json=, not as {key}=")


def _explained(error: msgspec.ValidationError, section: str, i: int, entry: Any) -> Finding:
    """The finding on an entry that violates the schema. msgspec gives the reason and the path of the field."""
    reason, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    singular = {"images": "image", "annotations": "annotation", "categories": "category"}[section]
    name = f"{section}[{i}]{_identity(entry)}"
    if absent := re.fullmatch(r"Object missing required field `(\w+)`", reason):
        field = absent[1]
        where = f"{name} lacks {field}{_of_segment(entry, path)}"
        return Finding(f"incomplete {singular} entry", where, _remedy(field, path))
    field = (re.findall(r"\w*[a-z_]\w*", path) or [""])[-1]
    where = f"{name}: {path or 'it'} is {_value(entry, path)}; {reason[:1].lower()}{reason[1:]}"
    remedy = _remedy(field, path if re.search("[<>]=", reason) else "")
    return Finding(f"malformed {singular} entry", where, remedy)


def _identity(entry: Any) -> str:
    """The ids and names of an entry, for a message."""
    keys = ("id", "image_id", "file_name", "name")
    known = [f"{key} {_short(entry[key])}" for key in keys if key in entry] if isinstance(entry, dict) else []
    return f" ({', '.join(known)})" if known else ""


def _of_segment(entry: Any, path: str) -> str:
    return f" of a segment, {path}: {_value(entry, path)}" if path.startswith("segments_info") else ""


def _remedy(field: str, path: str) -> str:
    """What to write. path: of the field in its entry, if its value is out of range or missing; else ""."""
    inner = field == "id" and path.startswith("segments_info")
    return REMEDIES.get("id of a segment" if inner else field, REMEDY)


def _value(entry: Any, path: str) -> str:
    """The value at a path of msgspec, such as segments_info[2].id; shortened."""
    for name, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", path):
        try:
            entry = entry[name] if name else entry[int(index)]
        except (LookupError, TypeError):
            break
    return _short(entry)


def _short(value: Any, most: int = 80) -> str:
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _type(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "dict": "object"}.get(type(value).__name__, type(value).__name__)


def _contradictions(content: Content, kind: Kind, outside: bool, lost: set) -> Iterator[Finding]:
    """Where entries contradict each other. lost: (list, id as text) of the malformed entries, which are left out."""
    images, annotations = [image.id for image in content.images], content.annotations
    if not images and not lost:
        yield Finding("no image", "`images` is empty", "list the images, with their annotation")
    yield from _check_categories(content.categories, any(section == "categories" for section, _ in lost))
    yield from repeated([c.name for c in content.categories], "duplicate category name", "give each its own name")
    texts = sum(isinstance(i, str) for i in images)
    if 0 < texts < len(images):
        where = f"{texts} of {len(images)} are texts, such as {next(i for i in images if isinstance(i, str))!r}"
        yield Finding("image ids of two types", where, "write all of them as numbers, or all as texts")
    yield from repeated(images, "duplicate image id", "keep one of the `images` entries, or give each image its own id")
    for i in sorted({a.image_id for a in annotations} - set(images), key=str):
        if ("images", str(i)) not in lost:
            remedy = "add the image to `images`, or correct image_id"
            yield Finding("annotation without image", f"image id {i!r}", remedy)
    if not outside and kind is not INSTANCES:
        yield from _check_names(content, kind)
    known = {c.id for c in content.categories}
    if lost:
        known |= {a for a in _used(content, kind) - known if ("categories", str(a)) in lost}
    yield from _check_segments(content, known) if kind is PANOPTIC else _check_objects(content, known)


def _used(content: Content, kind: Kind) -> set[int]:
    """The category ids that occur in annotations."""
    annotations = content.annotations
    return {o.category_id for a in annotations for o in (a.segments_info if kind is PANOPTIC else (a,))}


def _check_categories(categories: list[Category], lost: bool = False) -> Iterator[Finding]:
    if not categories and not lost:
        yield Finding("no category", "`categories` is empty", "list every category with its id and name")
    yield from repeated([c.id for c in categories], "duplicate category id", "ids of categories must be unique")


def _check_names(content: Content, kind: Kind) -> Iterator[Finding]:
    entries = [*content.images, *(content.annotations if kind is PANOPTIC else ())]
    for name in sorted({e.file_name for e in entries if leaves_folder(e.file_name) or "\0" in e.file_name}):
        where = f"file_name {_short(name)} is absolute, contains .., or is no valid file name"
        remedy = (
            "write paths relative to the registered folder, or allow it for this dataset (DATASETS.CUSTOM: "
            "outside=allowed)"
        )
        yield Finding("file outside its folder", where, remedy)


def _check_segments(content: PanopticContent, known: set[int]) -> Iterator[Finding]:
    annotated = [a.image_id for a in content.annotations]
    yield from repeated(annotated, "image annotated twice", "merge the annotations, or delete one of them")
    names = [a.file_name for a in content.annotations]
    yield from repeated(names, "panoptic PNG used twice", "give each image its own PNG")
    for annotation in content.annotations:
        segments = annotation.segments_info
        if len({s.id for s in segments}) < len(segments):
            ids = [s.id for s in segments]
            remedy = "give each segment its own id, in the JSON and in the pixels of its PNG"
            yield from repeated(ids, "duplicate segment id", remedy, f"{annotation.file_name}: ")
        for s in segments:
            if s.category_id not in known:
                where = f"{annotation.file_name}: segment {s.id} has category_id {s.category_id}"
                yield Finding("unknown category", where, "add it to `categories`, or correct it")


def _check_objects(content: DetectionContent, known: set[int]) -> Iterator[Finding]:
    boxes = [o.bbox for o in content.annotations if hasattr(o, "bbox")]
    if all(0 <= min(x, y) and max(x + w, y + h) <= 1 for x, y, w, h in boxes) and any(v % 1 for b in boxes for v in b):
        where = f"every bbox lies in [0, 1], such as {list(boxes[0])}"
        remedy = "boxes are in pixels: multiply x and width by the image's width, y and height by its height"
        yield Finding("boxes in shares of the image", where, remedy)
    for i, o in enumerate(content.annotations):
        if o.category_id not in known:
            yield Finding("unknown category", f"{_object(i, o)}: {o.category_id}", "add it to `categories`")
        if o.ignore:
            yield Finding("object to be ignored", f"{_object(i, o)} has ignore 1", REMEDIES["ignore"])
        if isinstance(getattr(o, "segmentation", None), list) and not any(map(is_polygon, o.segmentation)):
            where = f"{_object(i, o)} has no polygon of three points or more: {_short(o.segmentation)}"
            yield Finding("object without a mask", where, REMEDIES["segmentation"])


def is_polygon(points: list[float]) -> bool:
    """Whether [x1, y1, x2, y2, ...] has at least three points."""
    return len(points) >= 6 and len(points) % 2 == 0


def _object(i: int, o) -> str:
    return f"annotations[{i}]{'' if o.id is None else f' (id {o.id!r})'} of image {o.image_id!r}"


def repeated(values: Iterable, kind: str, remedy: str, prefix: str = "") -> list[Finding]:
    """A finding for each value that occurs more than once."""
    return [Finding(kind, f"{prefix}{v} ({n} times)", remedy) for v, n in Counter(values).items() if n > 1]
