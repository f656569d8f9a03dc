"""The registry of transformer encoders, and the contract of its members."""

from collections.abc import Sequence

from fvcore.common.registry import Registry
from torch import nn

TRANSFORMER_ENCODER_REGISTRY = Registry("TRANSFORMER_ENCODER")
TRANSFORMER_ENCODER_REGISTRY.__doc__ = """
Encoders that refine the projected maps of the backbone. A member is an `ExitEncoder`, built as `Encoder(cfg)`, with

- `exits`: tuple of int, the exits that it offers, ascending;
- `input_projection(in_channels) -> nn.Module`: a 1x1 convolution and its norm, from a map of the backbone to an input
  map of the encoder. The pixel decoder owns and initialises it;
- `forward(maps, pos, exits) -> {exit: maps}`: maps and pos are lists, coarse to fine, of [B, C, h, w] (pos may have
  B = 1). The maps of exit k have the same shapes and equal the result of an encoder of only k layers. Layers that exits
  share run once. Layers that no exit needs do not run. Other exits are refused (`wanted_exits`);
- `start(maps, pos) -> state` and `advance(state, exit) -> (state, maps)`: the steps of `forward`, with the same bits.
  `state.take(rows)` keeps only some images of the batch. A member writes `step`, and also `start` where its layers do
  not refine maps. A layer may run again only where it belongs to each exit, as Lite's last layer does;
- `encoder.layers`: its layers, so all encoders have the same parameter names. Exit k calls k of them, each once. A
  member without layers (TRANSFORMER_ENC_LAYERS 0) raises ValueError.
"""


def build_transformer_encoder(cfg) -> nn.Module:
    """Builds the encoder named by MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME."""
    return TRANSFORMER_ENCODER_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME)(cfg)


def wanted_exits(exits: Sequence[int], offered: Sequence[int]) -> set[int]:
    """The exits as a set. Raises ValueError if there is none, or one is not offered."""
    wanted = set(exits)
    if not wanted or not wanted <= set(offered):
        raise ValueError(f"exits {sorted(wanted)} asked of an encoder that offers {list(offered)}")
    return wanted
