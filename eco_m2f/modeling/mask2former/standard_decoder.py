"""MaskFormer's transformer decoder (arXiv 2107.06278): DETR's decoder on the coarsest map, with masks instead of boxes.

Compared with Mask2Former's it reads one map, does not mask attention, starts queries at zero, and predicts nothing
before the first layer. Shared parameters have Mask2Former's names.
"""

from collections.abc import Sequence

from detectron2.config import configurable
from torch import Tensor, nn

from ..detr.transformer import DetrDecoder
from ..layers import MLP, sine_position, xavier_matrices_
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY, predict_masks


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(nn.Module):
    """Queries look at the whole coarsest map. Each layer's queries give classes and masks."""

    in_feature = "transformer_encoder"

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
        dropout: float,
        mask_dim: int,
        enforce_input_project: bool,
    ):
        super().__init__()
        if not mask_classification:
            raise ValueError("this decoder only classifies masks: set mask_classification to True")
        same = in_channels == hidden_dim and not enforce_input_project
        self.input_proj = nn.Identity() if same else nn.Conv2d(in_channels, hidden_dim, 1)
        self.transformer = DetrDecoder(hidden_dim, num_layers, num_heads, dim_feedforward, dropout)
        xavier_matrices_(self.transformer)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg, in_channels: int, mask_classification: bool = True) -> dict:
        m = cfg.MODEL.MASK_FORMER
        if m.ENC_LAYERS != 0 or m.PRE_NORM or m.DEC_LAYERS < 1:
            raise ValueError(
                "this decoder needs MASK_FORMER.ENC_LAYERS 0 (the encoder is the pixel decoder's), PRE_NORM False and "
                f"DEC_LAYERS >= 1; got {m.ENC_LAYERS}, {m.PRE_NORM} and {m.DEC_LAYERS}"
            )
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": m.HIDDEN_DIM,
            "num_queries": m.NUM_OBJECT_QUERIES,
            "num_heads": m.NHEADS,
            "dim_feedforward": m.DIM_FEEDFORWARD,
            "num_layers": m.DEC_LAYERS,
            "dropout": m.DROPOUT,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": m.ENFORCE_INPUT_PROJ,
        }

    def forward(self, maps: Sequence[Tensor], mask_features: Tensor, aux: bool = True) -> dict:
        """
        Args:
            maps: [B, C, h, w] each, coarse to fine; only the first is read.
            mask_features: [B, mask_dim, H/4, W/4].
            aux: predict after each layer, for the losses.

        Returns:
            pred_logits [B, Q, num_classes + 1] and pred_masks [B, Q, H/4, W/4] (logits). With `aux` also aux_outputs:
            the same after each layer but the last.
        """
        x = self.input_proj(maps[0])  # [B, hidden_dim, h, w]
        pos = sine_position(*x.shape[-2:], x.shape[1], x.device).to(x.dtype)
        memory, pos = (m.flatten(2).transpose(1, 2) for m in (x, pos))  # [B or 1, h * w, hidden_dim]
        found = self.transformer(self.query_embed.weight, memory, pos, None, aux)  # [B, Q, hidden_dim] each
        *before, last = (self._predict(x, mask_features) for x in found)
        return {**last, "aux_outputs": before} if aux else last

    def _predict(self, x: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        return {"pred_logits": self.class_embed(x), "pred_masks": predict_masks(self.mask_embed(x), mask_features)}
