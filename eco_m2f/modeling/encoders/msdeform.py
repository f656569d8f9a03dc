"""The parent's encoder: layers of multi-scale deformable self-attention over all levels.

State-dict names are Mask2Former's: `level_embed`, `encoder.layers.N...`. A subclass that runs the same layers on other
tokens overrides `step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ...ops import MSDeformAttn
from ..layers import pixel_centres, xavier_matrices_
from .exit_encoder import EncoderState, ExitEncoder
from .registry import TRANSFORMER_ENCODER_REGISTRY


class MSDeformEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with residual and post-norm."""

    def __init__(
        self, dim: int, dim_feedforward: int, dropout: float, num_levels: int, num_heads: int, num_points: int
    ):
        super().__init__()
        self.self_attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        shapes: list[tuple[int, int]],
        values: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, S, C], pos [1 or B, S, C], reference_points [1, S, 1, 2] -> [B, S, C].

        values [B, sum of h * w, C]: the tokens that attention reads, by default `tokens`.
        """
        attended = self.self_attn(tokens + pos, reference_points, tokens if values is None else values, shapes)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(torch.relu_(self.linear1(tokens)))
        return self.norm2(tokens + self.dropout(self.linear2(hidden)))


@dataclass(frozen=True)
class TokenState(EncoderState):
    """The tokens of all levels, coarse first; S is the sum of h * w over `shapes`."""

    tokens: Tensor  # [B, S, C]
    pos: Tensor  # [1 or B, S, C]
    reference: Tensor  # [1, S, 1, 2]
    shapes: list[tuple[int, int]]


@TRANSFORMER_ENCODER_REGISTRY.register()
class MSDeformEncoder(ExitEncoder):
    """Mask2Former's deformable encoder; exit k is the state after layer k."""

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
        layer_levels: Sequence[int] | None = None,
    ):
        """layer_levels: the number of levels, from the coarsest, that each layer reads; by default all."""
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"an encoder needs at least one layer, got {num_layers}: set TRANSFORMER_ENC_LAYERS")
        self.dim = dim
        self.exits = tuple(range(1, num_layers + 1))
        self.encoder = nn.Module()  # a plain holder, for the published parameter names
        self.encoder.layers = nn.ModuleList(
            MSDeformEncoderLayer(dim, dim_feedforward, dropout, levels, num_heads, num_points)
            for levels in layer_levels or [num_levels] * num_layers
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self._initialise()

    def _initialise(self) -> None:
        xavier_matrices_(self)
        for layer in self.encoder.layers:
            layer.self_attn.reset_parameters()
        nn.init.normal_(self.level_embed)

    @classmethod
    def from_config(cls, cfg) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "dim": head.CONVS_DIM,
            "num_layers": head.TRANSFORMER_ENC_LAYERS,
            "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "num_levels": len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
            "num_heads": head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS,
            "num_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
        }

    def input_projection(self, in_channels: int) -> nn.Sequential:
        """See `TRANSFORMER_ENCODER_REGISTRY`."""
        return nn.Sequential(nn.Conv2d(in_channels, self.dim, 1), nn.GroupNorm(32, self.dim))

    def start(self, maps: Sequence[Tensor], pos: Sequence[Tensor]) -> TokenState:
        shapes = [tuple(m.shape[-2:]) for m in maps]
        tokens = flatten_levels(maps)  # [B, S, C]
        pos = flatten_levels([p + e[:, None, None] for p, e in zip(pos, self.level_embed)])  # [1 or B, S, C]
        return TokenState(0, tokens, pos, reference_points(shapes, tokens.device, tokens.dtype), shapes)

    def step(self, state: TokenState, exit: int) -> tuple[TokenState, list[Tensor]]:
        tokens = state.tokens
        for layer in self.encoder.layers[state.exit : exit]:
            tokens = layer(tokens, state.pos, state.reference, state.shapes)
        return replace(state, exit=exit, tokens=tokens), split_levels(tokens, state.shapes)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """[B, C, h, w] per level -> tokens [B, S, C], S the sum of h * w."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


def split_levels(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `flatten_levels`. The maps lie in memory as the tokens do, channels last.

    Reversing the order of these steps would give other strides. Resizing would not take them for channels last, and be
    twenty times slower.
    """
    parts = tokens.split([h * w for h, w in shapes], dim=1)
    return [p.unflatten(1, shape).permute(0, 3, 1, 2) for p, shape in zip(parts, shapes)]


def reference_points(shapes: Sequence[tuple[int, int]], device, dtype) -> Tensor:
    """The pixel centres of each level as (x, y) in [0, 1], shared by all levels -> [1, S, 1, 2]."""
    return torch.cat([pixel_centres(h, w, device, dtype) for h, w in shapes])[None, :, None]
