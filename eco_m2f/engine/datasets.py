"""Whether datasets go with a config and a model; the loader of a test split."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..data.categories import SEMANTIC_TYPES, by_position, check_same_classes
from ..data.check import check_at_start, check_class_count
from ..data.classes import dataset_classes
from ..data.datasets import parse_custom, register_from_config
from ..data.mappers import PanopticTestMapper
from ..data.present import check_present, loading
from ..modeling.exit_policy import OracleExit


def check_datasets(cfg: CfgNode, names: Sequence[str]) -> None:
    """Stops early on a dataset that is not there, of other classes than the model's, or with a faulty JSON."""
    wanted = [entry for entry in cfg.DATASETS.CUSTOM if parse_custom(entry)["name"] in names]
    register_from_config(wanted, cfg.DATASETS.TRAIN)  # those that are absent end here
    check_number_of_classes(cfg, names)
    check_present(*names)
    evaluated = cfg.DATASETS.TEST if cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON else ()
    check_at_start(names, _training_set(cfg), evaluated)


def check_number_of_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Stops on a dataset without the kind of annotation that the model needs, or of another number of classes."""
    known = cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY  # else building the model says what is wrong
    parent = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE) if known else None
    annotation = getattr(parent, "annotation", "panoptic")
    for name in dict.fromkeys(names):
        check_class_count(name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, annotation, _training_set(cfg))


def _training_set(cfg: CfgNode) -> str | None:
    """The dataset that says which classes there are: the first of DATASETS.TRAIN that is registered."""
    return next((name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog.list()), None)


def check_model_classes(model: nn.Module, dataset_name: str) -> None:
    """Raises ValueError, with both lists, unless a dataset has the classes of the model, numbered alike."""
    trained = getattr(getattr(model, "module", model), "classes", None)
    if not trained:
        return
    classes = dataset_classes(dataset_name)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") in SEMANTIC_TYPES:
        trained, classes = by_position(trained), by_position(classes)
    check_same_classes(trained, classes, "the model", f"dataset {dataset_name!r}")


def check_oracle(model: nn.Module, dataset_name: str) -> None:
    """Stops early where an oracle knows other images, or the qualities of other weights, than those to be evaluated."""
    model = getattr(model, "module", model)
    policy = getattr(model, "exit_policy", None)
    if not isinstance(policy, OracleExit):
        return
    from ..checkpoint.parent_hash import parent_sha256  # needs pyarrow, as this policy does

    if _annotation(policy.dataset) != _annotation(dataset_name):
        raise ValueError(
            f"MODEL.ECO.DERIVED {policy.derived} is of {policy.dataset!r}, but {dataset_name!r} is evaluated: derive it"
        )
    if policy.parent_sha256 != parent_sha256(model.state_dict()):
        raise ValueError(
            f"MODEL.ECO.DERIVED {policy.derived} was made with other weights: load those, or derive it anew"
        )


def _annotation(dataset_name: str) -> str:
    """The annotation file of a dataset, or its name: a split may be registered twice, with and without class maps."""
    metadata = MetadataCatalog.get(dataset_name) if dataset_name in DatasetCatalog.list() else None
    files = (getattr(metadata, key, None) for key in ("panoptic_json", "json_file"))
    return next((file for file in files if file), dataset_name)


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """Images one by one at test size, each rank its share."""
    with loading(dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=PanopticTestMapper(cfg))
