"""Backbones registered with detectron2."""

from .swin import D2SwinTransformer

__all__ = ["D2SwinTransformer"]
