"""Backbones registered with detectron2."""

from .resnet import build_dc5_resnet_backbone
from .swin import D2SwinTransformer
from .timm import TimmBackbone

__all__ = ["D2SwinTransformer", "TimmBackbone", "build_dc5_resnet_backbone"]
