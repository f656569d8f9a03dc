"""Builds the evaluators of a dataset."""

import os

from detectron2.data import MetadataCatalog

from ..costs import ExitCosts, TokenCosts
from ..data.categories import SEMANTIC_TYPES
from ..quality.ground_truth import BoxGroundTruth, PanopticGroundTruth, SemanticGroundTruth
from .boxes import BoxEvaluator
from .cityscapes_instances import CityscapesInstanceEvaluator, CityscapesInstances
from .collect import Evaluators
from .exit_statistics import ExitStatistics
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
    costs: ExitCosts | TokenCosts | None = None,
    semantic_on: bool = True,
    instance_on: bool = True,
    panoptic_on: bool = True,
    max_detections: int = 100,
) -> Evaluators:
    """Evaluators of PQ, mIoU and AP, as switched on. With `costs` also the statistics of exits or tokens.

    A dataset in COCO's panoptic format gets all three. One with class maps only gets mIoU, one in COCO's detection
    format the AP of boxes. The AP of masks (`segm`) is Cityscapes' own on Cityscapes and COCO's elsewhere. Results go
    to `output_dir/<dataset_name>` if output_dir is given. Raises ValueError for a dataset of another `evaluator_type`,
    or if files that an evaluator needs are missing.
    """
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    known = [*PANOPTIC_TYPES, *SEMANTIC_TYPES, BOX_TYPE]
    if kind not in known:
        raise ValueError(f"dataset {dataset_name!r} has evaluator_type {kind!r}: it must be one of {known}")
    folder = os.path.join(output_dir, dataset_name) if output_dir else None
    evaluators = [] if costs is None else [_statistics(costs)(costs, folder)]
    if kind == BOX_TYPE:
        evaluators.append(BoxEvaluator(BoxGroundTruth(dataset_name), folder, max_detections))
        return Evaluators(evaluators, folder)
    if kind in SEMANTIC_TYPES:
        if not semantic_on:
            raise ValueError(f"dataset {dataset_name!r} has only class maps: set MODEL.MASK_FORMER.TEST.SEMANTIC_ON")
        return Evaluators([*evaluators, SemanticEvaluator(SemanticGroundTruth(dataset_name), folder)], folder)
    truth = PanopticGroundTruth(dataset_name)
    if panoptic_on:
        evaluators.append(PanopticEvaluator(truth, folder))
    if semantic_on:
        evaluators.append(SemanticEvaluator(truth, folder))
    if instance_on:
        if kind == "cityscapes_panoptic_seg":
            evaluators.append(CityscapesInstanceEvaluator(CityscapesInstances(truth), folder))
        else:
            evaluators.append(InstanceEvaluator(truth, folder, max_detections))
    return Evaluators(evaluators, folder)


def _statistics(costs: ExitCosts | TokenCosts) -> type[ExitStatistics] | type[TokenStatistics]:
    return TokenStatistics if isinstance(costs, TokenCosts) else ExitStatistics
