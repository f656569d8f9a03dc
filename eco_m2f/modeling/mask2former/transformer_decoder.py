"""Mask2Former's transformer decoder with masked attention (the `predictor`)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d
from fvcore.common.registry import Registry
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..layers import MLP, attend, resize, sine_position, xavier_matrices_

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Predictors. A member is built as `Decoder(cfg, in_channels, mask_classification=True)`, and called as
(maps coarse to fine, mask_features, aux=True) -> {pred_logits, pred_masks, aux_outputs}. Without aux it neither returns
nor computes aux_outputs. Its `in_feature` is the MASK_FORMER.TRANSFORMER_IN_FEATURE that the config must have.
"""


class _Residual(nn.Module):
    """A sublayer with a residual and a LayerNorm: before the sublayer (`pre_norm`), else after the sum."""

    def __init__(self, dim: int, pre_norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, *args) -> Tensor:
        if self.pre_norm:
            return x + self.sublayer(self.norm(x), *args)
        return self.norm(x + self.sublayer(x, *args))


class CrossAttentionLayer(_Residual):
    def __init__(self, dim: int, num_heads: int, pre_norm: bool):
        super().__init__(dim, pre_norm)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads)
        xavier_matrices_(self)

    def sublayer(self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        return attend(self.multihead_attn, x + query_pos, key, value, allowed)


class SelfAttentionLayer(_Residual):
    def __init__(self, dim: int, num_heads: int, pre_norm: bool):
        super().__init__(dim, pre_norm)
        self.self_attn = nn.MultiheadAttention(dim, num_heads)
        xavier_matrices_(self)

    def sublayer(self, x: Tensor, query_pos: Tensor) -> Tensor:
        q = x + query_pos
        return attend(self.self_attn, q, q, x, None)


class FFNLayer(_Residual):
    def __init__(self, dim: int, dim_feedforward: int, pre_norm: bool):
        super().__init__(dim, pre_norm)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        xavier_matrices_(self)

    def sublayer(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Queries attend, level by level, to the foreground of their last mask prediction."""

    in_feature = "multi_scale_pixel_decoder"

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
        num_levels: int = 3,
    ):
        super().__init__()
        if not mask_classification:
            raise ValueError("this decoder only classifies masks: set mask_classification to True")
        self.num_layers, self.num_levels = num_layers, num_levels
        layer = lambda kind, *args: nn.ModuleList(kind(hidden_dim, *args, pre_norm) for _ in range(num_layers))  # noqa: E731
        self.transformer_self_attention_layers = layer(SelfAttentionLayer, num_heads)
        self.transformer_cross_attention_layers = layer(CrossAttentionLayer, num_heads)
        self.transformer_ffn_layers = layer(FFNLayer, dim_feedforward)
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.input_proj = nn.ModuleList(
            Conv2d(in_channels, hidden_dim, 1)
            if in_channels != hidden_dim or enforce_input_project
            else nn.Sequential()
            for _ in range(num_levels)
        )
        for proj in self.input_proj:
            if isinstance(proj, nn.Conv2d):
                c2_xavier_fill(proj)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg, in_channels: int, mask_classification: bool = True) -> dict:
        m = cfg.MODEL.MASK_FORMER
        if m.ENC_LAYERS != 0:
            raise ValueError(
                f"MASK_FORMER.ENC_LAYERS must be 0 (the encoder is the pixel decoder's), got {m.ENC_LAYERS}"
            )
        if m.DEC_LAYERS < 2:
            raise ValueError(
                f"MASK_FORMER.DEC_LAYERS must be at least 2, got {m.DEC_LAYERS}: it counts the prediction before the "
                "first layer too"
            )
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": m.HIDDEN_DIM,
            "num_queries": m.NUM_OBJECT_QUERIES,
            "num_heads": m.NHEADS,
            "dim_feedforward": m.DIM_FEEDFORWARD,
            "num_layers": m.DEC_LAYERS - 1,
            "pre_norm": m.PRE_NORM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": m.ENFORCE_INPUT_PROJ,
            "num_levels": len(cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
        }

    def forward(self, maps: Sequence[Tensor], mask_features: Tensor, aux: bool = True) -> dict:
        """
        Args:
            maps: [B, C, h, w], coarse to fine.
            mask_features: [B, mask_dim, H/4, W/4].
            aux: predict after each layer, for the losses. Else the masks that guide attention are made at its own
                resolution, from resized mask features. A mask is linear in these, so the result is the same.

        Returns:
            pred_logits [B, Q, num_classes + 1] and pred_masks [B, Q, H/4, W/4] (logits). With `aux` also aux_outputs:
            the same before the first layer and after each layer but the last.
        """
        sizes = [tuple(m.shape[-2:]) for m in maps]
        keys, values = zip(*(self._level(i, m) for i, m in enumerate(maps)))  # [B, h * w, C] each
        batch = mask_features.shape[0]
        query_pos = self.query_embed.weight.expand(batch, -1, -1)  # [B, Q, C]
        x = self.query_feat.weight.expand(batch, -1, -1)  # [B, Q, C]
        small = None if aux else [resize(mask_features, size) for size in sizes[: self.num_layers]]
        outputs = []
        for i in range(self.num_layers):
            level = i % self.num_levels
            if aux:
                outputs.append(self._predict(x, mask_features))
                masks = resize(outputs[-1]["pred_masks"].detach(), sizes[level])
            else:
                masks = self._masks(self.decoder_norm(x), small[level])  # [B, Q, h, w]
            allowed = allowed_keys(masks)  # [B, Q, h * w]
            x = self.transformer_cross_attention_layers[i](x, query_pos, keys[level], values[level], allowed)
            x = self.transformer_self_attention_layers[i](x, query_pos)
            x = self.transformer_ffn_layers[i](x)
        last = self._predict(x, mask_features)
        return {**last, "aux_outputs": outputs} if aux else last

    def _level(self, i: int, level_map: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a level, [B, h * w, C] each. Only the keys have the position code."""
        projected = self.input_proj[i](level_map)  # [B, C, h, w]
        pos = sine_position(*level_map.shape[-2:], projected.shape[1], level_map.device).to(projected.dtype)
        value = projected.flatten(2).transpose(1, 2) + self.level_embed.weight[i]
        return value + pos.flatten(2).transpose(1, 2), value

    def _predict(self, x: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        x = self.decoder_norm(x)
        return {"pred_logits": self.class_embed(x), "pred_masks": self._masks(x, mask_features)}

    def _masks(self, x: Tensor, mask_features: Tensor) -> Tensor:
        return predict_masks(self.mask_embed(x), mask_features)


def predict_masks(embedding: Tensor, mask_features: Tensor) -> Tensor:
    """Mask logits [B, Q, h, w]: the embeddings [B, Q, C] of the queries times the mask features [B, C, h, w]."""
    return torch.einsum("bqc,bchw->bqhw", embedding, mask_features)


@torch.no_grad()
def allowed_keys(mask_logits: Tensor) -> Tensor:
    """Masked attention: the keys that each query may see, from masks at the level's size -> [B, Q, h * w] bool.

    A query sees the keys where its mask has a probability >= 0.5. A query with an empty mask sees all keys.
    """
    allowed = mask_logits.flatten(2).sigmoid() >= 0.5
    return allowed | ~allowed.any(dim=-1, keepdim=True)
