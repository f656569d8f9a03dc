"""DATASETS.CUSTOM: own datasets from YAML or the command line, e.g. "name=cells,images=a,panoptic=b,json=c.json".

A dataset in COCO's detection format, for DETR, is "name=cells,images=a,boxes=b.json". In YAML an entry may also be a
mapping: {name: cells, images: a, panoptic: b, json: c.json}. `paths.resolve` resolves the paths.
"""

import csv
import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..annotations import read_categories
from ..categories import in_order_of, registered_categories, same_categories
from ..schema import PANOPTIC
from .coco_boxes import register_coco_boxes
from .coco_panoptic_like import register_coco_panoptic_like
from .paths import check_there, resolve

logger = logging.getLogger(__name__)
REQUIRED = ("name", "images", "panoptic", "json")
OPTIONAL = ("instances", "sem_seg", "outside")
BOXES = ("name", "images", "boxes")  # required for a dataset of boxes


def parse_custom(spec: str | Mapping[str, str]) -> dict[str, str]:
    """The fields of one entry, a mapping or "key=value,key=value".

    In the string form, put double quotes around a part that contains a comma, as in CSV: 'name=a,"images=b,c",...'.
    A panoptic dataset has name (for DATASETS.TRAIN or TEST), images (folder), panoptic (folder of PNGs) and json
    (panoptic JSON). instances (COCO instance JSON) and sem_seg (folder of class-map PNGs) are optional. A dataset of
    boxes has name, images and boxes (COCO detection JSON). outside=allowed lets file names leave their folders.
    Raises ValueError naming the key that is unknown, missing, repeated or empty.
    """
    pairs = list(spec.items()) if isinstance(spec, Mapping) else _split(spec)
    of_boxes = any(key == "boxes" for key, _ in pairs)
    required, optional = (BOXES, ("outside",)) if of_boxes else (REQUIRED, (*OPTIONAL, "boxes"))
    fields: dict[str, str] = {}
    for key, value in pairs:
        if key not in required + optional:
            raise ValueError(
                f"DATASETS.CUSTOM entry {spec!r}: unknown key {key!r}, use {', '.join(required + optional)}"
            )
        if key in fields:
            raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: {key!r} is given twice")
        if not isinstance(value, str) or not value:
            raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: {key!r} must be a non-empty text, got {value!r}")
        fields[key] = value
    missing = [key for key in required if key not in fields]
    if missing:
        raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: lacks {', '.join(missing)}")
    if fields.get("outside", "allowed") != "allowed":
        raise ValueError(f"DATASETS.CUSTOM entry {spec!r}: outside must be 'allowed' or left out")
    return fields


def _split(spec: str) -> list[tuple[str, str]]:
    if not isinstance(spec, str):
        raise ValueError(f"DATASETS.CUSTOM entry {spec!r} must be a text or a mapping, got {type(spec).__name__}")
    try:
        (parts,) = csv.reader([spec], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"DATASETS.CUSTOM entry {spec!r} cannot be split at its commas ({error})") from error
    pairs = []
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(
                f"DATASETS.CUSTOM entry {spec!r}: {part.strip()!r} is not of the form key=value; put double quotes "
                "around a part that contains a comma"
            )
        pairs.append((key, value))
    return pairs


def register_from_config(
    specs: Iterable[str | Mapping[str, str]], training: Sequence[str] = (), absent_ok: bool = False
) -> list[str]:
    """Registers every dataset in cfg.DATASETS.CUSTOM and returns their names, in order.

    Classes are numbered as in the first dataset of `training`, or else as in the first of the list. Other datasets
    with the same categories in another order follow it. Calling it again does nothing.

    Args:
        training: DATASETS.TRAIN.
        absent_ok: leave out datasets whose JSON does not exist. A model that only predicts does not need them.

    Raises ValueError or DataError if an entry or its JSON is wrong.
    """
    if isinstance(specs, (str, Mapping)):  # iterating over a string gives its letters
        raise ValueError(f'DATASETS.CUSTOM must be a list of entries, got {specs!r}: write ["..."]')
    parsed = [fields for fields in (_resolved(parse_custom(spec), absent_ok) for spec in specs) if fields]
    known = [registered_categories(MetadataCatalog.get(name)) for name in training if name in DatasetCatalog.list()]
    order = {name: i for i, name in enumerate(training)}
    for fields in sorted(parsed, key=lambda fields: order.get(fields["name"], len(order))):
        if "boxes" in fields:
            register_coco_boxes(fields["name"], fields["images"], fields["boxes"], outside="outside" in fields)
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
            outside="outside" in fields,
        )
        known.append(categories)
    return [fields["name"] for fields in parsed]


def _resolved(written: Mapping[str, str], absent_ok: bool) -> dict[str, str] | None:
    """The fields of an entry with its paths resolved. None if its JSON is absent and `absent_ok` is set."""
    fields = {k: v if k in ("name", "outside") else resolve(v) for k, v in written.items()}
    annotation, kind = ("boxes", "detection") if "boxes" in fields else ("json", "panoptic")
    if absent_ok and not os.path.exists(fields[annotation]):
        logger.info("dataset %s is left out: %s does not exist", fields["name"], fields[annotation])
        return None
    check_there(fields[annotation], written[annotation], kind)
    return fields


def _categories(json_file: str, known: Sequence[list[dict]]) -> list[dict]:
    """The categories of a panoptic JSON, in the order of the first known list with the same categories."""
    categories = [c.as_dict() for c in read_categories(json_file, PANOPTIC)]
    return next((in_order_of(k, categories) for k in known if same_categories(k, categories)), categories)
