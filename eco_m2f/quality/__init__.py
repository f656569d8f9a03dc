"""What Step B says of an image at an exit: qualities, one file each, and the ground truth that they are taken from."""

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
