"""Lite-M2F's encoder: all layers but the last refine only the coarse levels (Lite DETR, arXiv 2303.07335).

It differs from that paper as ECO-M2F does (arXiv 2404.15244): no key-aware attention, and one group of cheap layers
before a single full layer. Parameters have the parent's number, names and shapes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .msdeform import MSDeformEncoder, TokenState, split_levels
from .registry import TRANSFORMER_ENCODER_REGISTRY


@TRANSFORMER_ENCODER_REGISTRY.register()
class LiteEncoder(MSDeformEncoder):
    """Exit k runs the first k - 1 layers, which are cheap, and then the last layer, which is always full.

    In a cheap layer all tokens are values, but those of the finest level are no queries and stay as they are. The last
    layer runs once for each requested exit. The run then goes on from the state before that layer.
    """

    def step(self, state: TokenState, exit: int) -> tuple[TokenState, list[Tensor]]:
        *cheap, full = self.encoder.layers
        tokens, shapes = state.tokens, state.shapes
        height, width = shapes[-1]
        coarse, fine = tokens.split([tokens.shape[1] - height * width, height * width], dim=1)  # [B, S, C] of their S
        coarse_pos, coarse_reference = (x[:, : coarse.shape[1]] for x in (state.pos, state.reference))
        for layer in cheap[max(state.exit - 1, 0) : exit - 1]:
            coarse = layer(coarse, coarse_pos, coarse_reference, shapes, values=tokens)
            tokens = torch.cat((coarse, fine), dim=1)
        maps = split_levels(full(tokens, state.pos, state.reference, shapes), shapes)
        return replace(state, exit=exit, tokens=tokens), maps
