"""Any dataset in COCO's detection format, registered without writing code.

The format: a folder of images, and one JSON with images, annotations (image_id, category_id, bbox x y w h in pixels,
area, iscrowd) and categories (id, name, color). See https://cocodataset.org/#format-data.
"""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..panoptic_map import DataError
from .coco_panoptic_like import category_colors, check_categories, raise_unless_same, read_coco_json
from .paths import inside

EVALUATOR_TYPE = "coco"  # detectron2's name of the format


def register_coco_boxes(
    name: str,
    image_root: str | Path,
    json_file: str | Path,
    *,
    categories: list[dict] | None = None,
    outside: bool = False,
) -> None:
    """Registers a dataset and its metadata with detectron2's catalogs; registering the same again does nothing.

    categories: those of the JSON, read from it if None (then it must exist now). outside: file names may lead out of
    image_root. Contiguous class ids 0..C-1 follow
    the categories' ids, as detectron2 has them. Raises DataError if the JSON is missing or malformed, ValueError if
    the name is taken by other data.
    """
    categories = sorted(read_box_json(json_file)["categories"] if categories is None else categories, key=_id)
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
    DatasetCatalog.register(name, lambda: load_coco_boxes(name, image_root, json_file, outside))
    MetadataCatalog.get(name).set(**meta)


def load_coco_boxes(name: str, image_root: str | Path, json_file: str | Path, outside: bool = False) -> list[dict]:
    """detectron2's dataset dicts: file_name, image_id, height, width (pixels), annotations (contiguous category_id).

    Raises DataError if the JSON is missing, malformed or without images, or names files out of image_root.
    """
    images = read_box_json(json_file)["images"]
    if not images:
        raise DataError(f"{json_file}: it lists no image")
    for image in images:
        inside(image_root, image["file_name"], outside)
    return load_coco_json(str(json_file), str(image_root), name)


def read_box_json(json_file: str | Path) -> dict:
    """As `read_coco_json`, of the detection kind; every annotation is to have a box, every category id and name."""
    content = read_coco_json(json_file, "detection")
    check_categories(json_file, content["categories"], {"id", "name"})
    boxless = next((a for a in content["annotations"] if len(a.get("bbox") or ()) != 4), None)
    if boxless is not None:
        raise DataError(f"{json_file}: annotation {boxless.get('id')} has no bbox [x, y, width, height]")
    return content


def _id(category: dict) -> int:
    return category["id"]
