"""Looks up the metadata of a registered dataset, and the kind of its annotation."""

from collections.abc import Callable

from detectron2.data import DatasetCatalog, MetadataCatalog

from .categories import SEMANTIC_TYPES
from .datasets.coco_boxes import EVALUATOR_TYPE


def is_semantic(name: str) -> bool:
    """Whether a dataset is evaluated by its class maps."""
    return name in DatasetCatalog.list() and MetadataCatalog.get(name).get("evaluator_type") in SEMANTIC_TYPES


def has_boxes(name: str) -> bool:
    """Whether a dataset is in COCO's detection format without panoptic annotation."""
    meta = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
    return getattr(meta, "evaluator_type", None) == EVALUATOR_TYPE and not getattr(meta, "panoptic_json", None)


def metadata_of(name: str, alike: Callable[[str], bool]):
    """The metadata of a dataset. Raises ValueError if it is not registered; the message lists the names of `alike`."""
    if name not in DatasetCatalog.list():
        others = sorted(n for n in DatasetCatalog.list() if alike(n))
        raise ValueError(
            f"dataset {name!r} is not registered; choose one of {others}, or register your own by DATASETS.CUSTOM"
        )
    return MetadataCatalog.get(name)


def box_metadata(name: str):
    """The metadata of a dataset in COCO's detection format. Raises ValueError for another kind."""
    meta = metadata_of(name, lambda n: n.endswith(("_detection_train", "_detection_val")) or n.startswith("coco_2017"))
    if getattr(meta, "evaluator_type", None) != EVALUATOR_TYPE:
        raise ValueError(
            f"dataset {name!r} has no boxes in COCO's detection format: choose a detection dataset, such as "
            "coco_2017_train or toy_detection_train, or an entry boxes=<json> of DATASETS.CUSTOM"
        )
    return meta


def panoptic_metadata(name: str):
    """The metadata of a panoptic dataset. Raises ValueError for another kind."""
    meta = metadata_of(name, lambda n: "panoptic" in n and not n.endswith(("_separated", "_stuffonly")))
    if not getattr(meta, "panoptic_json", None):
        raise ValueError(f"dataset {name!r} has no panoptic annotation (its metadata lacks panoptic_json)")
    return meta


def may_lie_outside(meta) -> bool:
    """Whether the dataset's files may lie outside its folder."""
    return getattr(meta, "outside", False)
