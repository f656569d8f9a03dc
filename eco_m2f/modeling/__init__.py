"""Importing this package fills detectron2's registries with Mask2Former, DETR, and both with early exits."""

from . import backbones, encoders
from .detr import Detr, EcoDetr
from .dovit import DoViT
from .early_exits import EarlyExits
from .eco_maskformer import EcoMaskFormer
from .head import MaskFormerHead
from .maskformer import MaskFormer
from .pixel_decoder import MSDeformAttnPixelDecoder
from .standard_decoder import StandardTransformerDecoder
from .transformer_decoder import MultiScaleMaskedTransformerDecoder

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
