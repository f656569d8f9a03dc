"""Importing this package fills detectron2's registries with Mask2Former, DETR, and both with early exits."""

from . import backbones, encoders
from .detr import Detr, EcoDetr
from .dovit import DoViT
from .early_exits import EarlyExits
from .mask2former.eco_maskformer import EcoMaskFormer
from .mask2former.head import MaskFormerHead
from .mask2former.maskformer import MaskFormer
from .mask2former.pixel_decoder import MSDeformAttnPixelDecoder
from .mask2former.standard_decoder import StandardTransformerDecoder
from .mask2former.transformer_decoder import MultiScaleMaskedTransformerDecoder

__all__ = [
    "Detr",
    "DoViT",
    "EarlyExits",
    "EcoDetr",
    "EcoMaskFormer",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
    "backbones",
    "encoders",
]
