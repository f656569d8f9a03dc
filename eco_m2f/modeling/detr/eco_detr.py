"""ECO-DETR: a DETR with early exits."""

from detectron2.modeling import META_ARCH_REGISTRY

from ..early_exits import EarlyExits
from .detr import Detr


@META_ARCH_REGISTRY.register()
class EcoDetr(EarlyExits, Detr):
    """DETR with early exits (arXiv 2404.15244, section 4)."""
