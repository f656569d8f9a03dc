"""DoViT: a vision transformer for semantic segmentation whose tokens stop once they are sure of their class."""

from .dovit import DoViT
from .heads import MaskTransformerHead, NaiveHead
from .vit import TokenPassViT

__all__ = ["DoViT", "MaskTransformerHead", "NaiveHead", "TokenPassViT"]
