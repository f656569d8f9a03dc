"""DETR and ECO-DETR."""

from .detr import Detr
from .eco_detr import EcoDetr
from .head import DetrHead

__all__ = ["Detr", "DetrHead", "EcoDetr"]
