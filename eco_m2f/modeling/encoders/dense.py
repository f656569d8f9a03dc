"""Dense attention over all tokens, post-norm: DETR's encoder, which MaskFormer runs on res5 (arXiv 2107.06278).

Parameter names below `encoder` are those of DETR's published checkpoints: `layers.N...`. Tensors are batch first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import attend, xavier_matrices_
from .exit_encoder import EncoderState, ExitEncoder
from .msdeform import flatten_levels, split_levels
from .registry import TRANSFORMER_ENCODER_REGISTRY


@dataclass(frozen=True)
class DenseState(EncoderState):
    """The tokens of all maps; S is the sum of h * w over `shapes`."""

    tokens: Tensor  # [B, S, C]
    pos: Tensor  # [1 or B, S, C]
    allowed: Tensor | None  # [B, 1, S] bool, the tokens that attention may look at; None: all
    shapes: list[tuple[int, int]]


@TRANSFORMER_ENCODER_REGISTRY.register()
class DenseEncoder(ExitEncoder):
    """DETR's encoder in a pixel decoder. It ignores padding: each token looks at all others."""

    @configurable
    def __init__(self, *, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.dim = dim
        self.encoder = DetrEncoder(dim, num_layers, num_heads, dim_feedforward, dropout)
        xavier_matrices_(self.encoder)

    @classmethod
    def from_config(cls, cfg) -> dict:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        return {
            "dim": head.CONVS_DIM,
            "num_layers": head.TRANSFORMER_ENC_LAYERS,
            "num_heads": former.NHEADS,
            "dim_feedforward": former.DIM_FEEDFORWARD,
            "dropout": former.DROPOUT,
        }

    @property
    def exits(self) -> tuple[int, ...]:
        return self.encoder.exits

    def input_projection(self, in_channels: int) -> nn.Sequential:
        """See `TRANSFORMER_ENCODER_REGISTRY`; without a norm, as in DETR."""
        return nn.Sequential(nn.Conv2d(in_channels, self.dim, 1))

    def start(self, maps: Sequence[Tensor], pos: Sequence[Tensor]) -> DenseState:
        return self.encoder.start(maps, pos)

    def step(self, state: DenseState, exit: int) -> tuple[DenseState, list[Tensor]]:
        return self.encoder.step(state, exit)


class DetrEncoder(ExitEncoder):
    """DETR's encoder; exit k is the state after layer k. The contract is that of `TRANSFORMER_ENCODER_REGISTRY`.

    It also takes the padding. It has no final norm, so all exits give the decoder the same format.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        if num_layers < 1:
            raise ValueError(
                f"an encoder needs at least one layer, got {num_layers}: "
                "set SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS, of DETR MODEL.DETR.ENC_LAYERS"
            )
        self.exits = tuple(range(1, num_layers + 1))
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, dim_feedforward, dropout) for _ in range(num_layers))

    def forward(
        self,
        maps: Sequence[Tensor],
        pos: Sequence[Tensor],
        exits: Sequence[int],
        padding: Sequence[Tensor] | None = None,
    ) -> dict[int, list[Tensor]]:
        """
        Args:
            maps: [B, C, h, w] each (DETR and MaskFormer have one); pos: the same, or with B = 1.
            exits: some of the encoder's exits.
            padding: [B, h, w] bool each, True where there is no image; default: no padding.

        Returns:
            {exit: maps}, with the shapes of `maps`.
        """
        return self.run(self.start(maps, pos, padding), exits)

    def start(
        self, maps: Sequence[Tensor], pos: Sequence[Tensor], padding: Sequence[Tensor] | None = None
    ) -> DenseState:
        """Arguments as in `forward`."""
        shapes = [tuple(m.shape[-2:]) for m in maps]
        allowed = None if padding is None else allowed_tokens(padding)
        return DenseState(0, flatten_levels(maps), flatten_levels(pos), allowed, shapes)

    def step(self, state: DenseState, exit: int) -> tuple[DenseState, list[Tensor]]:
        tokens = state.tokens  # [B, S, C]
        for layer in self.layers[state.exit : exit]:
            tokens = layer(tokens, state.pos, state.allowed)
        return replace(state, exit=exit, tokens=tokens), split_levels(tokens, state.shapes)


class DetrLayer(nn.Module):
    """The part that DETR's encoder and decoder layers share: self-attention, a feed-forward network, dropout."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ):
        super().__init__()
        self.activation = activation
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend_self(self, x: Tensor, pos: Tensor, allowed: Tensor | None) -> Tensor:
        """Adds the position code to queries and keys, but not to values."""
        q = x + pos
        return self.norm1(x + self.dropout(attend(self.self_attn, q, q, x, allowed)))

    def feed_forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return norm(x + self.dropout(self.linear2(hidden)))


class EncoderLayer(DetrLayer):
    """Self-attention and a feed-forward network, each with residual and post-norm."""

    def forward(self, tokens: Tensor, pos: Tensor, allowed: Tensor | None = None) -> Tensor:
        """tokens [B, S, C], pos [B or 1, S, C] or [S, C], allowed [B, 1, S] or None -> [B, S, C]."""
        return self.feed_forward(self.attend_self(tokens, pos, allowed), self.norm2)


def allowed_tokens(padding: Sequence[Tensor]) -> Tensor:
    """The tokens that attention may look at, [B, 1, S] bool; padding: [B, h, w] bool for each map."""
    return ~torch.cat([p.flatten(1) for p in padding], dim=1)[:, None]
