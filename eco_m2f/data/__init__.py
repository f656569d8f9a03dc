"""Datasets, mappers and the toy set. Importing this package registers the project's datasets with detectron2."""

from . import datasets  # registers toy, nuclei and COCO-with-semantics
from .categories import SEMANTIC_TYPES, check_same_categories
from .check import check_at_start, check_class_count, check_dataset
from .datasets import register_coco_panoptic_like, register_from_config
from .loader import build_train_loader
from .mappers import MAPPERS, PanopticTestMapper, build_train_mapper

__all__ = [
    "MAPPERS",
    "SEMANTIC_TYPES",
    "PanopticTestMapper",
    "build_train_loader",
    "build_train_mapper",
    "check_at_start",
    "check_class_count",
    "check_dataset",
    "check_same_categories",
    "datasets",
    "register_coco_panoptic_like",
    "register_from_config",
]
