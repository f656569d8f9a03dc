"""Importing this package fills detectron2's registries with Mask2Former and ECO-M2F."""

from . import backbones, encoders
from .dovit import DoViT
from .eco_maskformer import EcoMaskFormer
from .head import MaskFormerHead
from .maskformer import MaskFormer
from .pixel_decoder import MSDeformAttnPixelDecoder
from .transformer_decoder import MultiScaleMaskedTransformerDecoder

__all__ = [
    "DoViT",
    "EcoMaskFormer",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "backbones",
    "encoders",
]
