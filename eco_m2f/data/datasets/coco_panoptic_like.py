"""Any dataset in COCO panoptic format, registered without writing code.

The format: a folder of images, a folder of panoptic PNGs, and one JSON with images, annotations (file_name and
segments_info) and categories (id, name, isthing, color). See https://cocodataset.org/#format-data.
"""

import colorsys
import json
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..panoptic_map import DataError
from .paths import inside

EVALUATOR_TYPE = "panoptic_like"  # PQ, mIoU and AP, all from the panoptic ground truth


def register_coco_panoptic_like(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    *,
    categories: list[dict] | None = None,
    sem_seg_root: str | Path | None = None,
    instances_json: str | Path | None = None,
    evaluator_type: str = EVALUATOR_TYPE,
    outside: bool = False,
) -> None:
    """Registers a dataset and its metadata with detectron2's catalogs; registering the same again does nothing.

    Args: categories: those of the JSON, read from it if None (then the JSON must exist now); sem_seg_root: a folder
    of class-map PNGs named as the panoptic ones, for evaluators that want them; instances_json: COCO instance
    annotations for AP, where the dataset has them; outside: file names may lead out of their folders.
    Contiguous class ids 0..C-1 follow the order of the categories, things and stuff alike.
    Raises DataError if the JSON is missing or malformed, ValueError if the name is taken by other data.
    """
    if categories is None:
        categories = read_categories(panoptic_json)
    meta = {
        **category_metadata(categories),
        "image_root": str(image_root),
        "panoptic_root": str(panoptic_root),
        "panoptic_json": str(panoptic_json),
        "sem_seg_root": None if sem_seg_root is None else str(sem_seg_root),
        "json_file": None if instances_json is None else str(instances_json),
        "evaluator_type": evaluator_type,
        "ignore_label": 255,
        "label_divisor": 1000,
        "outside": outside,
    }
    if name in DatasetCatalog.list():
        raise_unless_same(name, meta)
        return
    DatasetCatalog.register(name, lambda: load_coco_panoptic_like(image_root, panoptic_root, panoptic_json, meta))
    MetadataCatalog.get(name).set(**meta)


def category_metadata(categories: list[dict]) -> dict:
    """Names, colours and the two id tables detectron2's panoptic evaluator reads, from a JSON's `categories`."""
    names = [c["name"] for c in categories]
    colors = category_colors(categories)
    tables = {True: {}, False: {}}
    for i, category in enumerate(categories):
        tables[bool(category["isthing"])][category["id"]] = i
    return {
        # All names under both: contiguous ids span things and stuff, and detectron2's drawing looks up either list.
        "thing_classes": names,
        "stuff_classes": names,
        "thing_colors": colors,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": tables[True],
        "stuff_dataset_id_to_contiguous_id": tables[False],
    }


def category_colors(categories: list[dict]) -> list[tuple[int, ...]]:
    """RGB of each category, 0 to 255; made up where none is declared."""
    return [tuple(c.get("color") or _color(i, len(categories))) for i, c in enumerate(categories)]


def read_categories(panoptic_json: str | Path) -> list[dict]:
    """The categories of a panoptic JSON, checked. Raises DataError."""
    categories = read_coco_json(panoptic_json)["categories"]
    check_categories(panoptic_json, categories, {"id", "name", "isthing"})
    return categories


def check_categories(json_file: str | Path, categories: list[dict], keys: set[str]) -> None:
    """Raises DataError where a category lacks a key, or ids are not unique."""
    for category in categories:
        missing = keys - category.keys()
        if missing:
            raise DataError(f"{json_file}: category {category} lacks {sorted(missing)}; add them")
    ids = [c["id"] for c in categories]
    if not ids or len(set(ids)) < len(ids):
        raise DataError(f"{json_file}: category ids must be present and unique, got {ids}")


def read_coco_json(json_file: str | Path, kind: str = "panoptic") -> dict:
    """Parses a JSON of COCO's "panoptic" or "detection" kind and checks that it is one.

    Raises DataError naming what is missing.
    """
    try:
        content = json.loads(Path(json_file).read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{json_file}: {kind} JSON not found; datasets/README.md tells where each dataset's files belong "
            "(the root is $DETECTRON2_DATASETS, ./datasets if unset)"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{json_file}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{json_file}: not in COCO {kind} format, it holds a {type(content).__name__}, not an object")
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise DataError(f"{json_file}: not in COCO {kind} format, it lacks {missing}")
    return content


def load_coco_panoptic_like(
    image_root: str | Path, panoptic_root: str | Path, panoptic_json: str | Path, meta: dict
) -> list[dict]:
    """Reads the JSON into detectron2's dataset dicts.

    Each has file_name, image_id, height, width (pixels), pan_seg_file_name, segments_info (contiguous category_id,
    isthing, id, iscrowd and what else the JSON holds) and, with meta["sem_seg_root"], sem_seg_file_name.
    Raises DataError where an annotation has no image, or a category nobody declared, or a file name leads out of its
    folder and meta["outside"] does not allow it.
    """
    outside = meta.get("outside", False)
    content = read_coco_json(panoptic_json)
    images = {image["id"]: image for image in content["images"]}
    records = []
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            raise DataError(f"{panoptic_json}: image_id {annotation['image_id']!r} is annotated but not in `images`")
        record = {
            "file_name": inside(image_root, image["file_name"], outside),
            "image_id": annotation["image_id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": inside(panoptic_root, annotation["file_name"], outside),
            "segments_info": [_contiguous(s, meta, panoptic_json) for s in annotation["segments_info"]],
        }
        if meta.get("sem_seg_root"):
            record["sem_seg_file_name"] = inside(meta["sem_seg_root"], annotation["file_name"], outside)
        records.append(record)
    if not records:
        raise DataError(f"{panoptic_json}: it annotates no image")
    return records


def _contiguous(segment: dict, meta: dict, panoptic_json: str | Path) -> dict:
    category = segment["category_id"]
    for key, isthing in (("thing_dataset_id_to_contiguous_id", True), ("stuff_dataset_id_to_contiguous_id", False)):
        if category in meta[key]:
            return {"iscrowd": 0, **segment, "category_id": meta[key][category], "isthing": isthing}
    raise DataError(f"{panoptic_json}: segment {segment['id']} has category_id {category}, which no category declares")


def raise_unless_same(name: str, meta: dict) -> None:
    """Raises ValueError if a name is registered with metadata other than these."""
    known = MetadataCatalog.get(name).as_dict()
    different = [key for key, value in meta.items() if known.get(key) != value]
    if different:
        raise ValueError(
            f"dataset {name!r} is already registered with other {different}: choose another name "
            f"({different[0]}: {known.get(different[0])!r} there, {meta[different[0]]!r} here)"
        )


def _color(i: int, count: int) -> list[int]:
    """A colour for a category that declares none: hues spread evenly."""
    return [round(255 * c) for c in colorsys.hsv_to_rgb(i / count, 0.65, 0.9)]
