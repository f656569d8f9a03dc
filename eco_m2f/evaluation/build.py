"""Which evaluators a dataset gets."""

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
    """PQ, mIoU and AP for the heads that are on, and with `costs` of the model the statistics of its exits or tokens.

    Serves any dataset in COCO's panoptic format, those of class maps alone, which get mIoU, and those in COCO's
    detection format, which get the AP of boxes; results go to `output_dir/<dataset_name>` where that is given. AP on
    Cityscapes is Cityscapes' own, elsewhere COCO's; both are called `segm`. Raises ValueError for a dataset of another
    `evaluator_type`, or where files that an evaluator needs are missing.
    """
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    known = [*PANOPTIC_TYPES, *SEMANTIC_TYPES, BOX_TYPE]
    if kind not in known:
        raise ValueError(f"dataset {dataset_name!r} has evaluator_type {kind!r}; known are {known}")
    folder = os.path.join(output_dir, dataset_name) if output_dir else None
    evaluators = [] if costs is None else [_statistics(costs)(costs, folder)]
    if kind == BOX_TYPE:
        evaluators.append(BoxEvaluator(BoxGroundTruth(dataset_name), folder, max_detections))
        return Evaluators(evaluators, folder)
    if kind in SEMANTIC_TYPES:
        if not semantic_on:
            raise ValueError(f"dataset {dataset_name!r} has class maps alone: set MODEL.MASK_FORMER.TEST.SEMANTIC_ON")
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
