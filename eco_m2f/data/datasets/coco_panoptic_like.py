"""Registers any dataset in COCO panoptic format.

The format is a folder of images, a folder of panoptic PNGs, and one JSON. The JSON has images, annotations (file_name
and segments_info) and categories (id, name, isthing, color). See https://cocodataset.org/#format-data.
"""

import colorsys
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..annotations import class_map_file, image_file, read_categories, read_registered
from ..panoptic_map import DataError
from ..schema import PANOPTIC, Image, PanopticAnnotation, Segment

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
    """Registers a dataset and its metadata with detectron2's catalogs. Registering the same again does nothing.

    Contiguous class ids 0..C-1 follow the order of the categories, things and stuff alike.

    Args:
        categories: those of the JSON. None reads them from it, so it must exist now.
        sem_seg_root: a folder of class-map PNGs with the names of the panoptic ones, for evaluators that read them.
        instances_json: COCO instance annotations for AP, if the dataset has them.
        outside: whether file names may leave `image_root` and `panoptic_root`, by `..` or as absolute paths.

    Raises DataError if the JSON is missing or malformed, ValueError if the name is registered with other data.
    """
    if categories is None:
        categories = [c.as_dict() for c in read_categories(panoptic_json, PANOPTIC)]
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
    DatasetCatalog.register(name, lambda: load_coco_panoptic_like(meta))
    MetadataCatalog.get(name).set(**meta)


def category_metadata(categories: list[dict]) -> dict:
    """Names, colours and the two id tables of detectron2's panoptic evaluator, from a JSON's `categories`."""
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
    """RGB of each category, 0 to 255. Categories without a colour get one."""
    return [tuple(c.get("color") or _color(i, len(categories))) for i, c in enumerate(categories)]


def load_coco_panoptic_like(meta: Mapping) -> list[dict]:
    """Reads the JSON of a dataset with these metadata into detectron2's dataset dicts.

    Each has file_name, image_id, pan_seg_file_name and segments_info (contiguous category_id, isthing, id, iscrowd).
    Height and width (pixels) are there if the JSON has both, and sem_seg_file_name if the dataset has class maps.
    Raises DataError if the JSON is wrong or annotates no image.
    """
    metadata = SimpleNamespace(**meta)
    content = read_registered(metadata)
    if not content.annotations:
        raise DataError(f"{metadata.panoptic_json}: it annotates no image; add annotations")
    images = {image.id: image for image in content.images}
    classes = {**metadata.stuff_dataset_id_to_contiguous_id, **metadata.thing_dataset_id_to_contiguous_id}
    things = set(metadata.thing_dataset_id_to_contiguous_id)
    if unknown := sorted({c.id for c in content.categories} - classes.keys()):
        raise DataError(f"{metadata.panoptic_json}: categories {unknown} are not registered with the dataset")
    return [_record(images[a.image_id], a, metadata, classes, things) for a in content.annotations]


def _record(
    image: Image, annotation: PanopticAnnotation, metadata: SimpleNamespace, classes: dict[int, int], things: set[int]
) -> dict:
    class_map = class_map_file(metadata, image, annotation)
    return {
        "file_name": image_file(metadata, image),
        "image_id": image.id,
        **size_of(image),
        "pan_seg_file_name": os.path.join(metadata.panoptic_root, annotation.file_name),
        "segments_info": [_contiguous(s, classes, things) for s in annotation.segments_info],
        **({"sem_seg_file_name": class_map} if class_map else {}),
    }


def _contiguous(segment: Segment, classes: dict[int, int], things: set[int]) -> dict:
    contiguous = {"category_id": classes[segment.category_id], "isthing": segment.category_id in things}
    return {"id": segment.id, "iscrowd": int(segment.iscrowd or 0), **contiguous}


def size_of(image: Image) -> dict[str, int]:
    """Height and width of an `images` entry that has both."""
    return {} if image.height is None or image.width is None else {"height": image.height, "width": image.width}


def raise_unless_same(name: str, meta: dict) -> None:
    """Raises ValueError if a name is registered with metadata other than these."""
    known = MetadataCatalog.get(name).as_dict()
    different = [key for key, value in meta.items() if known.get(key) != value]
    if different:
        raise ValueError(
            f"dataset {name!r} is already registered with other {different}: choose another name "
            f"({different[0]}: registered {known.get(different[0])!r}, now {meta[different[0]]!r})"
        )


def _color(i: int, count: int) -> list[int]:
    """A colour for a category without one: hues are spread evenly."""
    return [round(255 * c) for c in colorsys.hsv_to_rgb(i / count, 0.65, 0.9)]
