"""DETR's transformer: dense attention over the tokens of one map, post-norm, with exits in the encoder.

Parameter names are those of the published checkpoints: `encoder.layers.N...`, `decoder.layers.N...`, `decoder.norm`.
Tensors are batch first. The mask of padded tokens is always handed to attention, also where nothing is padded: so
does the reference, on which the count of GFLOPs depends (`evaluation/flops.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..encoders.msdeform import flatten_levels, split_levels
from ..layers import attend


class _Layer(nn.Module):
    """What the two kinds of layers share: self-attention, the feed-forward network, dropout."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend_self(self, x: Tensor, pos: Tensor, allowed: Tensor | None) -> Tensor:
        q = x + pos
        return self.norm1(x + self.dropout(attend(self.self_attn, q, q, x, allowed)))

    def feed_forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        hidden = self.dropout(torch.relu(self.linear1(x)))
        return norm(x + self.dropout(self.linear2(hidden)))


class EncoderLayer(_Layer):
    def forward(self, tokens: Tensor, pos: Tensor, allowed: Tensor) -> Tensor:
        """tokens, pos [B, S, C], allowed [B, 1, S] -> [B, S, C]."""
        return self.feed_forward(self.attend_self(tokens, pos, allowed), self.norm2)


class DecoderLayer(_Layer):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__(dim, num_heads, dim_feedforward, dropout)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """x, query_pos [B, Q, C]; key, value [B, S, C]; allowed [B, 1, S] -> [B, Q, C]."""
        x = self.attend_self(x, query_pos, None)
        found = attend(self.multihead_attn, x + query_pos, key, value, allowed)
        x = self.norm2(x + self.dropout(found))
        return self.feed_forward(x, self.norm3)


class DetrEncoder(nn.Module):
    """DETR's encoder under the contract of `TRANSFORMER_ENCODER_REGISTRY`; exit k is the state after layer k.

    It also takes which tokens are padding, and has no final norm, so that every exit has the decoder's input format.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"an encoder needs at least one layer, got {num_layers}: set MODEL.DETR.ENC_LAYERS")
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
            maps: [B, C, h, w] each (DETR has one); pos: the same, or with B = 1.
            exits: those wanted, of `exits`.
            padding: [B, h, w] bool each, True where there is no image; default: none is padded.

        Returns:
            {exit: maps}, of the same shapes.
        """
        wanted = set(exits)
        if not wanted or not wanted <= set(self.exits):
            raise ValueError(f"exits {sorted(wanted)} asked of an encoder that offers {list(self.exits)}")
        shapes = [tuple(m.shape[-2:]) for m in maps]
        tokens, pos = flatten_levels(maps), flatten_levels(pos)  # [B, S, C]
        allowed = allowed_tokens(maps, padding)
        out = {}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            tokens = layer(tokens, pos, allowed)
            if depth in wanted:
                out[depth] = split_levels(tokens, shapes)
        return out


def allowed_tokens(maps: Sequence[Tensor], padding: Sequence[Tensor] | None) -> Tensor:
    """Which tokens attention may look at: [B, 1, S] bool."""
    if padding is None:
        padding = [m.new_zeros(len(m), *m.shape[-2:], dtype=torch.bool) for m in maps]
    return ~torch.cat([p.flatten(1) for p in padding], dim=1)[:, None]


class DetrDecoder(nn.Module):
    """Queries that look at the encoder's tokens; one norm, shared by the outputs of all layers."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, dim_feedforward, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, memory: Tensor, pos: Tensor, allowed: Tensor) -> list[Tensor]:
        """queries [Q, C], memory and pos [B, S, C], allowed [B, 1, S] -> the normed output of each layer, [B, Q, C]."""
        query_pos = queries.expand(len(memory), -1, -1)
        x = torch.zeros_like(query_pos)
        key = memory + pos
        outputs = []
        for layer in self.layers:
            x = layer(x, query_pos, key, memory, allowed)
            outputs.append(self.norm(x))
        return outputs
