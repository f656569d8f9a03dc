"""Quality and cost: PQ and AP per image and per dataset, mIoU, exits taken, tokens kept and GFLOPs."""

from .boxes import BoxEvaluator, BoxGroundTruth, BoxTarget
from .build import evaluators_for
from .cityscapes_instances import CityscapesInstanceEvaluator, CityscapesInstances
from .collect import EvaluationError, Evaluators
from .exit_statistics import ExitStatistics
from .instance import InstanceEvaluator
from .multi_scale import MultiScale
from .panoptic import PanopticEvaluator
from .panoptic_quality import ImageStatistics, PanopticTarget, dataset_pq, image_statistics, total_statistics
from .semantic import SemanticEvaluator
from .token_statistics import TokenStatistics

__all__ = [
    "BoxEvaluator",
    "BoxGroundTruth",
    "BoxTarget",
    "CityscapesInstanceEvaluator",
    "CityscapesInstances",
    "EvaluationError",
    "Evaluators",
    "ExitStatistics",
    "ImageStatistics",
    "InstanceEvaluator",
    "MultiScale",
    "PanopticEvaluator",
    "PanopticTarget",
    "SemanticEvaluator",
    "TokenStatistics",
    "dataset_pq",
    "evaluators_for",
    "image_statistics",
    "total_statistics",
]
