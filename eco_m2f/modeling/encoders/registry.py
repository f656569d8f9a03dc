"""The registry of transformer encoders, and the contract of its members."""

from collections.abc import Sequence

from fvcore.common.registry import Registry
from torch import nn

TRANSFORMER_ENCODER_REGISTRY = Registry("TRANSFORMER_ENCODER")
TRANSFORMER_ENCODER_REGISTRY.__doc__ = """
Encoders that refine the projected maps of the backbone. A member is an `ExitEncoder` built as `Encoder(cfg)`, with

- `exits`: tuple of int, the exits it offers, ascending;
- `input_projection(in_channels) -> nn.Module`: a 1x1 convolution and its norm, from a map of the backbone to one of
  the encoder; the pixel decoder owns and initialises it;
- `forward(maps, pos, exits) -> {exit: maps}`: maps and pos are lists, coarse to fine, of [B, C, h, w] (pos may have
  B = 1); for each requested exit k, maps of the same shapes, equal to what an encoder of only that exit's k layers
  returns. What exits have in common runs once, and nothing runs that none of them needs; `wanted_exits` refuses others;
- `start(maps, pos) -> state` and `advance(state, exit) -> (state, maps)`, of which `forward` is made: an exit's maps on
  demand, bit for bit those of one go. `state.take(rows)` goes on with some images of the batch. A member writes `step`,
  and `start` where its layers do not refine maps; a layer runs again only where every exit has it, as Lite's last;
- `encoder.layers`: its layers, so that every encoder's checkpoint is told by the same names; exit k calls k of them,
  each once. Without any (TRANSFORMER_ENC_LAYERS 0) it raises ValueError.
"""


def build_transformer_encoder(cfg) -> nn.Module:
    """Builds the encoder named by MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME."""
    return TRANSFORMER_ENCODER_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME)(cfg)


def wanted_exits(exits: Sequence[int], offered: Sequence[int]) -> set[int]:
    """The exits as a set. Raises ValueError where there is none, or one that is not offered."""
    wanted = set(exits)
    if not wanted or not wanted <= set(offered):
        raise ValueError(f"exits {sorted(wanted)} asked of an encoder that offers {list(offered)}")
    return wanted
