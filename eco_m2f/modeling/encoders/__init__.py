"""Transformer encoders of the pixel decoder, one file each."""

from .dense import DenseEncoder
from .exit_encoder import EncoderState, ExitEncoder
from .hybrid import HybridEncoder
from .lite import LiteEncoder
from .msdeform import MSDeformEncoder
from .proscale import ProScaleEncoder
from .registry import TRANSFORMER_ENCODER_REGISTRY, build_transformer_encoder

__all__ = [
    "TRANSFORMER_ENCODER_REGISTRY",
    "DenseEncoder",
    "EncoderState",
    "ExitEncoder",
    "HybridEncoder",
    "LiteEncoder",
    "MSDeformEncoder",
    "ProScaleEncoder",
    "build_transformer_encoder",
]
