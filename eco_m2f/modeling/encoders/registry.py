"""The registry of transformer encoders, and the contract of its members."""

from fvcore.common.registry import Registry
from torch import nn

TRANSFORMER_ENCODER_REGISTRY = Registry("TRANSFORMER_ENCODER")
TRANSFORMER_ENCODER_REGISTRY.__doc__ = """
Encoders that refine the projected maps of the backbone. A member is an `nn.Module` built as `Encoder(cfg)`, with

- `exits`: tuple of int, the exits it offers, ascending;
- `forward(maps, pos, exits) -> {exit: maps}`: maps and pos are lists, coarse to fine, of [B, C, h, w] (pos may have
  B = 1); for each requested exit k, maps of the same shapes, equal to what an encoder of only k layers returns. It
  runs max(exits) layers once, whatever the number of exits.
"""


def build_transformer_encoder(cfg) -> nn.Module:
    """Builds the encoder named by MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME."""
    return TRANSFORMER_ENCODER_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME)(cfg)
