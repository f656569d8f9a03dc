"""Registers datasets: the user's own folders, and the names that this project adds to detectron2's."""

from .builtin import register_all
from .coco_boxes import load_coco_boxes, register_coco_boxes
from .coco_panoptic_like import load_coco_panoptic_like, register_coco_panoptic_like
from .custom import parse_custom, register_from_config

__all__ = [
    "load_coco_boxes",
    "load_coco_panoptic_like",
    "parse_custom",
    "register_all",
    "register_coco_boxes",
    "register_coco_panoptic_like",
    "register_from_config",
]

register_all()
