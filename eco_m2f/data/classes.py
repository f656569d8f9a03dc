"""The classes of a model: those of its training set. A checkpoint stores them.

A class is a dict of plain values: `id` (the dataset's own), `name`, `isthing` and `color` (RGB, 0 to 255). A list of
them has the order of the model's classes.
"""

from collections.abc import Sequence

from detectron2.data import MetadataCatalog

from .categories import registered_categories
from .datasets.coco_panoptic_like import category_colors


def dataset_classes(name: str) -> list[dict]:
    """The classes of a registered dataset; [] if no dataset of that name is registered."""
    metadata = MetadataCatalog.get(name)
    classes = registered_categories(metadata)
    things = getattr(metadata, "thing_dataset_id_to_contiguous_id", {})
    return [
        {"id": c["id"], "name": c["name"], "isthing": int(c.get("isthing", c["id"] in things)), "color": list(color)}
        for c, color in zip(classes, _colors(metadata, classes))
    ]


def _colors(metadata, classes: list[dict]) -> Sequence[Sequence[int]]:
    """The colours in a dataset's metadata, or generated ones if they do not cover every class."""
    tables = (getattr(metadata, key, None) or () for key in ("stuff_colors", "thing_colors"))
    return next((table for table in tables if len(table) == len(classes)), None) or category_colors(classes)


def check_stored(classes: object, source: str) -> list[dict]:
    """Checks classes that were read from a file. Raises ValueError naming the file and the invalid entry."""
    if not isinstance(classes, (list, tuple)) or not classes:
        raise ValueError(f"{source}: `classes` must be a list of classes, got {type(classes).__name__}")
    for i, c in enumerate(classes):
        if not isinstance(c, dict) or not _is_class(c):
            raise ValueError(
                f"{source}: entry {i} of `classes` must have id (a number), name (a text), isthing (0 or 1) and color "
                f"(three numbers 0..255), got {str(c)[:200]}"
            )
    if len({c["id"] for c in classes}) < len(classes):
        raise ValueError(f"{source}: `classes` holds an id twice")
    return list(classes)


def _is_class(c: dict) -> bool:
    color = c.get("color")
    return (
        type(c.get("id")) is int
        and isinstance(c.get("name"), str)
        and c.get("isthing") in (0, 1)
        and isinstance(color, (list, tuple))
        and len(color) == 3
        and all(type(v) is int and 0 <= v <= 255 for v in color)
    )
