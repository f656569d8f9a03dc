"""Qualities, one file each: how good an image's result is at an exit. And the ground truth that they compare with."""

from .boxes import BoxAP
from .masks import MaskAP
from .panoptic import PanopticQuality
from .registry import QUALITY_REGISTRY, quality_named, quality_of_model
from .semantic import MeanIoU

__all__ = [
    "QUALITY_REGISTRY",
    "BoxAP",
    "MaskAP",
    "MeanIoU",
    "PanopticQuality",
    "quality_named",
    "quality_of_model",
]
