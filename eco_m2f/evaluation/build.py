"""Which evaluators a dataset gets."""

import importlib.util
import os

from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, DatasetEvaluators

from ..data import SEMANTIC_TYPES
from .boxes import BoxEvaluator, BoxGroundTruth
from .exit_statistics import ExitStatistics
from .ground_truth import PanopticGroundTruth, SemanticGroundTruth
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator
from .token_statistics import TokenStatistics

PANOPTIC_TYPES = ("coco_panoptic_seg", "panoptic_like", "cityscapes_panoptic_seg")
BOX_TYPE = "coco"  # COCO's detection format


def evaluators_for(
    dataset_name: str,
    output_dir: str | None = None,
    *,
    semantic_on: bool = True,
    instance_on: bool = True,
    panoptic_on: bool = True,
    max_detections: int = 100,
) -> DatasetEvaluators:
    """PQ, mIoU and AP for the heads that are on, and the statistics of exits or tokens.

    Serves any dataset in COCO's panoptic format, those of class maps alone, which get mIoU, and those in COCO's
    detection format, which get the AP of boxes; results go to `output_dir/<dataset_name>` where that is given. AP on
    Cityscapes comes from the official script, as `segm`, where `cityscapesscripts` is installed; else it is COCO's AP
    of the same objects and is called `segm_coco_style`, since the two are not comparable. Raises ValueError for a
    dataset of another `evaluator_type`.
    """
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    known = [*PANOPTIC_TYPES, *SEMANTIC_TYPES, BOX_TYPE]
    if kind not in known:
        raise ValueError(f"dataset {dataset_name!r} has evaluator_type {kind!r}; known are {known}")
    folder = os.path.join(output_dir, dataset_name) if output_dir else None
    evaluators = [ExitStatistics(folder), TokenStatistics(folder)]
    if kind == BOX_TYPE:
        return DatasetEvaluators([*evaluators, BoxEvaluator(BoxGroundTruth(dataset_name), folder, max_detections)])
    if kind in SEMANTIC_TYPES:
        if not semantic_on:
            raise ValueError(f"dataset {dataset_name!r} has class maps alone: set MODEL.MASK_FORMER.TEST.SEMANTIC_ON")
        return DatasetEvaluators([*evaluators, SemanticEvaluator(SemanticGroundTruth(dataset_name), folder)])
    truth = PanopticGroundTruth(dataset_name)
    if panoptic_on:
        evaluators.append(PanopticEvaluator(truth, folder))
    if semantic_on:
        evaluators.append(SemanticEvaluator(truth, folder))
    if instance_on:
        evaluators.append(_instance_evaluator(kind, truth, folder, max_detections))
    return DatasetEvaluators(evaluators)


def _instance_evaluator(kind: str, truth: PanopticGroundTruth, folder: str | None, max_detections: int):
    if kind != "cityscapes_panoptic_seg":
        return InstanceEvaluator(truth, folder, max_detections)
    if importlib.util.find_spec("cityscapesscripts") is not None:
        return CityscapesInstanceEvaluator(truth.name)
    return InstanceEvaluator(truth, folder, max_detections, key="segm_coco_style")
