"""Registers any dataset in COCO's detection format.

The format is a folder of images and one JSON with images, annotations and categories (id, name, color). Annotations
have image_id, category_id, bbox (x y w h, pixels), area and iscrowd. See https://cocodataset.org/#format-data.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..annotations import image_file, read_categories, read_registered
from ..panoptic_map import DataError
from ..schema import DETECTION
from .coco_panoptic_like import category_colors, raise_unless_same, size_of

EVALUATOR_TYPE = "coco"  # detectron2's name of the format


def register_coco_boxes(
    name: str,
    image_root: str | Path,
    json_file: str | Path,
    *,
    categories: list[dict] | None = None,
    outside: bool = False,
) -> None:
    """Registers a dataset and its metadata with detectron2's catalogs. Registering the same again does nothing.

    categories: those of the JSON. None reads them from it, so it must exist now.
    outside: whether file names may leave `image_root`.
    Contiguous class ids 0..C-1 follow the categories' ids, as in detectron2.
    Raises DataError if the JSON is missing or malformed, ValueError if the name is registered with other data.
    """
    if categories is None:
        categories = [c.as_dict() for c in read_categories(json_file, DETECTION)]
    categories = sorted(categories, key=lambda category: category["id"])
    meta = {
        "thing_classes": [c["name"] for c in categories],
        "thing_colors": category_colors(categories),
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
        "image_root": str(image_root),
        "json_file": str(json_file),
        "evaluator_type": EVALUATOR_TYPE,
        "outside": outside,
    }
    if name in DatasetCatalog.list():
        raise_unless_same(name, meta)
        return
    DatasetCatalog.register(name, lambda: load_coco_boxes(meta))
    MetadataCatalog.get(name).set(**meta)


def load_coco_boxes(meta: Mapping) -> list[dict]:
    """Reads the JSON of a dataset with these metadata into detectron2's dataset dicts, in the order of the images' ids.

    Each has file_name, image_id and annotations (contiguous category_id, bbox, bbox_mode, area, iscrowd). Height and
    width (pixels) are there if the JSON has both. Raises DataError if the JSON is missing, wrong or without images.
    """
    metadata = SimpleNamespace(**meta)
    content = read_registered(metadata)
    classes = metadata.thing_dataset_id_to_contiguous_id
    if unknown := sorted({c.id for c in content.categories} - classes.keys()):
        raise DataError(f"{metadata.json_file}: categories {unknown} are not registered with the dataset")
    objects: dict = {image.id: [] for image in content.images}
    for o in content.annotations:
        contiguous = {"category_id": classes[o.category_id], "bbox_mode": BoxMode.XYWH_ABS}
        objects[o.image_id].append({**o.as_dict(), **contiguous})
    return [
        {
            "file_name": image_file(metadata, image),
            "image_id": image.id,
            **size_of(image),
            "annotations": objects[image.id],
        }
        for image in sorted(content.images, key=lambda image: image.id)
    ]
