"""DoViT: a vision transformer for semantic segmentation. Tokens stop as soon as their class is certain."""

from .dovit import DoViT
from .heads import MaskTransformerHead, NaiveHead
from .vit import TokenPassViT

__all__ = ["DoViT", "MaskTransformerHead", "NaiveHead", "TokenPassViT"]
