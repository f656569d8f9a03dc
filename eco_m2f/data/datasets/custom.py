"""DATASETS.CUSTOM: own datasets from YAML or the command line, e.g. "name=cells,images=a,panoptic=b,json=c.json".

A dataset in COCO's detection format, for DETR, is "name=cells,images=a,boxes=b.json".
"""

from collections.abc import Iterable, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..annotations import read_categories
from ..categories import in_order_of, registered_categories, same_categories
from ..schema import PANOPTIC
from .coco_boxes import register_coco_boxes
from .coco_panoptic_like import register_coco_panoptic_like

REQUIRED = ("name", "images", "panoptic", "json")
OPTIONAL = ("instances", "sem_seg")
BOXES = ("name", "images", "boxes")  # all keys of a dataset of boxes


def parse_custom(spec: str) -> dict[str, str]:
    """Splits one "key=value,key=value" description; a comma within a value is not possible.

    Keys: name (to use in DATASETS.TRAIN or TEST), images (folder), panoptic (folder of PNGs), json (panoptic JSON),
    and optionally instances (COCO instance JSON) and sem_seg (folder of class-map PNGs). Or name, images and boxes
    (COCO detection JSON).
    Raises ValueError naming the key that is unknown, missing, doubled or empty.
    """
    fields: dict[str, str] = {}
    pieces = [[piece.strip() for piece in part.partition("=")] for part in spec.split(",")]
    of_boxes = any(key == "boxes" for key, _, _ in pieces)
    required, optional = (BOXES, ()) if of_boxes else (REQUIRED, (*OPTIONAL, "boxes"))
    for key, equals, value in pieces:
        if not equals or not value:
            raise ValueError(
                f"DATASETS.CUSTOM entry {spec!r}: {f'{key}{equals}{value}'!r} is not of the form key=value"
            )
        if key not in required + optional:
            raise ValueError(
                f"DATASETS.CUSTOM entry {spec!r}: unknown key {key!r}, use {', '.join(required + optional)}"
            )
        if key in fields:
            raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: {key!r} is given twice")
        fields[key] = value
    missing = [key for key in required if key not in fields]
    if missing:
        raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: lacks {', '.join(missing)}")
    return fields


def register_from_config(specs: Iterable[str], training: Sequence[str] = ()) -> list[str]:
    """Registers every dataset that cfg.DATASETS.CUSTOM lists and returns their names, in order.

    training: DATASETS.TRAIN. Classes are numbered as in the first of these; where there is none, as in the first
    dataset of the list: others that list the same categories in another order follow it.
    Raises ValueError or DataError where a description or its JSON is wrong. Calling it again does nothing new.
    """
    if isinstance(specs, str):  # a lone string would be taken letter by letter
        raise ValueError(f'DATASETS.CUSTOM must be a list of strings, got the string {specs!r}: write ["..."]')
    parsed = [parse_custom(spec) for spec in specs]
    known = [registered_categories(MetadataCatalog.get(name)) for name in training if name in DatasetCatalog.list()]
    order = {name: i for i, name in enumerate(training)}
    for fields in sorted(parsed, key=lambda fields: order.get(fields["name"], len(order))):
        if "boxes" in fields:
            register_coco_boxes(fields["name"], fields["images"], fields["boxes"])
            continue
        again = [registered_categories(MetadataCatalog.get(n)) for n in DatasetCatalog.list() if n == fields["name"]]
        categories = _categories(fields["json"], again + known)
        register_coco_panoptic_like(
            fields["name"],
            fields["images"],
            fields["panoptic"],
            fields["json"],
            categories=categories,
            instances_json=fields.get("instances"),
            sem_seg_root=fields.get("sem_seg"),
        )
        known.append(categories)
    return [fields["name"] for fields in parsed]


def _categories(json_file: str, known: Sequence[list[dict]]) -> list[dict]:
    """The categories of a panoptic JSON, in the order of the first of the known lists that has the same."""
    categories = [c.as_dict() for c in read_categories(json_file, PANOPTIC)]
    return next((in_order_of(k, categories) for k in known if same_categories(k, categories)), categories)
