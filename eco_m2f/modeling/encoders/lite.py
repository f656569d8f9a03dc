"""Lite-M2F's encoder: all layers but the last refine only the coarse levels (Lite DETR, arXiv 2303.07335).

Against the paper: no key-aware attention, and one group of cheap layers before a single full layer, as ECO-M2F takes
it over (arXiv 2404.15244). Parameters are the parent's, in number, names and shapes.
"""

import torch
from torch import Tensor

from .msdeform import MSDeformEncoder
from .registry import TRANSFORMER_ENCODER_REGISTRY


@TRANSFORMER_ENCODER_REGISTRY.register()
class LiteEncoder(MSDeformEncoder):
    """Exit k is the first k - 1 layers, cheap, and then the last layer, which is full whatever the exit.

    In a cheap layer the tokens of all levels but the finest are the queries, and all tokens the values; the finest
    level stays as it was. The last layer runs once for every exit asked for, each time on another state.
    """

    def run(
        self, tokens: Tensor, pos: Tensor, reference: Tensor, shapes: list[tuple[int, int]], wanted: set[int]
    ) -> dict[int, Tensor]:
        *cheap, full = self.encoder.layers
        height, width = shapes[-1]
        coarse, fine = tokens.split([tokens.shape[1] - height * width, height * width], dim=1)
        coarse_pos, coarse_reference = pos[:, : coarse.shape[1]], reference[:, : coarse.shape[1]]
        states = {}
        for k in range(1, max(wanted) + 1):
            if k > 1:
                coarse = cheap[k - 2](coarse, coarse_pos, coarse_reference, shapes, values=tokens)
                tokens = torch.cat((coarse, fine), dim=1)
            if k in wanted:
                states[k] = full(tokens, pos, reference, shapes)
        return states
