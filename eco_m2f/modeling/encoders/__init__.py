"""Transformer encoders of the pixel decoder, one file each."""

from .msdeform import MSDeformEncoder
from .registry import TRANSFORMER_ENCODER_REGISTRY, build_transformer_encoder

__all__ = ["TRANSFORMER_ENCODER_REGISTRY", "MSDeformEncoder", "build_transformer_encoder"]
