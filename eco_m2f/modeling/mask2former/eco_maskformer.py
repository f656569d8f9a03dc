"""ECO-M2F: a MaskFormer with early exits."""

from detectron2.modeling import META_ARCH_REGISTRY

from ..early_exits import EarlyExits
from .maskformer import MaskFormer


@META_ARCH_REGISTRY.register()
class EcoMaskFormer(EarlyExits, MaskFormer):
    """Mask2Former with early exits (arXiv 2404.15244, section 3)."""
