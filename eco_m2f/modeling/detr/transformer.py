"""DETR's transformer decoder: queries with dense attention over the tokens of one map, post-norm.

Parameter names are those of the published checkpoints: `layers.N...`, `norm`. Tensors are batch first. The encoder is
in `encoders/dense.py`.
"""

import torch
from torch import Tensor, nn

from ..encoders.dense import DetrLayer
from ..layers import attend


class DecoderLayer(DetrLayer):
    """Self-attention of the queries, attention to the encoder's tokens, and a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__(dim, num_heads, dim_feedforward, dropout)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """x, query_pos [B, Q, C]; key, value [B, S, C]; allowed [B, 1, S] or None -> [B, Q, C]."""
        x = self.attend_self(x, query_pos, None)
        found = attend(self.multihead_attn, x + query_pos, key, value, allowed)
        x = self.norm2(x + self.dropout(found))
        return self.feed_forward(x, self.norm3)


class DetrDecoder(nn.Module):
    """Queries that look at the encoder's tokens. The outputs of all layers share one norm."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, dim_feedforward, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, memory: Tensor, pos: Tensor, allowed: Tensor | None, aux: bool = True
    ) -> list[Tensor]:
        """queries [Q, C], memory [B, S, C], pos [B or 1, S, C], allowed [B or 1, 1, S] or None.

        Returns the normed outputs [B, Q, C] of all layers, or without `aux` only of the last.
        """
        query_pos = queries.expand(len(memory), -1, -1)  # [B, Q, C]
        x = torch.zeros_like(query_pos)
        key = memory + pos
        outputs = []
        for layer in self.layers:
            x = layer(x, query_pos, key, memory, allowed)
            outputs.append(x)
        return [self.norm(x) for x in (outputs if aux else outputs[-1:])]
