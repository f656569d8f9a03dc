"""Checks that datasets suit a config and a model, and makes the loader of a test split."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..checkpoint.parent_hash import parent_sha256
from ..data.categories import SEMANTIC_TYPES, by_position, check_same_classes
from ..data.check import check_at_start, check_class_count
from ..data.classes import dataset_classes
from ..data.datasets import parse_custom, register_from_config
from ..data.mappers import PanopticTestMapper
from ..data.present import check_present, loading


def check_datasets(cfg: CfgNode, names: Sequence[str]) -> None:
    """Raises an error early for a dataset that is missing, has other classes than the model, or has a faulty JSON."""
    wanted = [entry for entry in cfg.DATASETS.CUSTOM if parse_custom(entry)["name"] in names]
    register_from_config(wanted, cfg.DATASETS.TRAIN)  # raises for those that are absent
    check_number_of_classes(cfg, names)
    check_present(*names)
    evaluated = cfg.DATASETS.TEST if cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON else ()
    check_at_start(names, _training_set(cfg), evaluated)


def check_number_of_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Raises ValueError for a dataset without the annotation that the model needs, or with another class count."""
    known = cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY  # if not, building the model raises the error
    parent = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE) if known else None
    annotation = getattr(parent, "annotation", "panoptic")
    for name in dict.fromkeys(names):
        check_class_count(name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, annotation, _training_set(cfg))


def _training_set(cfg: CfgNode) -> str | None:
    """The dataset that defines the classes: the first registered one of DATASETS.TRAIN."""
    return next((name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog.list()), None)


def check_model_classes(model: nn.Module, dataset_name: str) -> None:
    """Raises ValueError, with both lists, unless dataset and model have the same classes in the same order."""
    trained = getattr(getattr(model, "module", model), "classes", None)
    if not trained:
        return
    classes = dataset_classes(dataset_name)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") in SEMANTIC_TYPES:
        trained, classes = by_position(trained), by_position(classes)
    check_same_classes(trained, classes, "the model", f"dataset {dataset_name!r}")


def check_policy(model: nn.Module, dataset_name: str) -> None:
    """Lets the exit policy refuse a dataset before it is evaluated, see `EXIT_POLICY_REGISTRY`."""
    model = getattr(model, "module", model)
    check = getattr(getattr(model, "exit_policy", None), "check_dataset", None)
    if check is not None:
        check(dataset_name, parent_sha256(model.state_dict()))


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """A loader of single images at test size; each process gets its share."""
    with loading(dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=PanopticTestMapper(cfg))
