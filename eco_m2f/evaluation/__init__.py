"""Quality and cost: PQ per image and per dataset, mIoU, AP, exits taken, tokens kept and GFLOPs."""

from .build import evaluators_for
from .exit_statistics import ExitStatistics
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .panoptic_quality import ImageStatistics, PanopticTarget, dataset_pq, image_statistics, total_statistics
from .semantic import SemanticEvaluator
from .token_statistics import TokenStatistics

__all__ = [
    "ExitStatistics",
    "ImageStatistics",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "PanopticTarget",
    "SemanticEvaluator",
    "TokenStatistics",
    "dataset_pq",
    "evaluators_for",
    "image_statistics",
    "total_statistics",
]
