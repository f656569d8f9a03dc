"""DETR without its backbone: projection, transformer, and the layers that predict classes and boxes."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..encoders import EncoderState
from ..encoders.dense import DetrEncoder, allowed_tokens
from ..layers import MLP, padded_sine_position, xavier_matrices_
from ..parent import ExitHead
from .transformer import DetrDecoder


class DetrHead(ExitHead):
    """From the backbone's coarsest map to class logits and boxes, at one exit or several.

    Parameter names are those of the published checkpoints.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_queries: int = 100,
        dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        in_feature: str = "res5",
    ):
        """in_channels: of the map `in_feature`; num_classes: without "no object", the last logit."""
        super().__init__()
        self.encoder_features = [in_feature]
        self.transformer = nn.Module()  # a plain holder, for the published parameter names
        self.transformer.encoder = DetrEncoder(dim, enc_layers, num_heads, dim_feedforward, dropout)
        self.transformer.decoder = DetrDecoder(dim, dec_layers, num_heads, dim_feedforward, dropout)
        xavier_matrices_(self.transformer)
        self.input_proj = nn.Conv2d(in_channels, dim, 1)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, 3)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        detr = cfg.MODEL.DETR
        if "res5" not in input_shape:
            raise ValueError(f"DETR reads the backbone's res5, which is not among {sorted(input_shape)}: add it")
        return {
            "in_channels": input_shape["res5"].channels,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_queries": detr.NUM_OBJECT_QUERIES,
            "dim": detr.HIDDEN_DIM,
            "num_heads": detr.NHEADS,
            "enc_layers": detr.ENC_LAYERS,
            "dec_layers": detr.DEC_LAYERS,
            "dim_feedforward": detr.DIM_FEEDFORWARD,
            "dropout": detr.DROPOUT,
        }

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits of the encoder, ascending."""
        return self.transformer.encoder.exits

    @property
    def projected_channels(self) -> int:
        return self.input_proj.out_channels

    def projected(self, features: dict[str, Tensor]) -> Tensor:
        """The encoder's input [B, C, h, w], before the position code."""
        return self.input_proj(features[self.coarsest])

    def encode(
        self, features: dict[str, Tensor], exits: Sequence[int]
    ) -> tuple[tuple[Tensor, Tensor], dict[int, list[Tensor]]]:
        """Runs the encoder once, to max(exits).

        Args:
            features: the backbone's maps, and "padding" [B, h, w] bool, True where there is no image (may be missing).

        Returns:
            (position code [B, C, h, w], padding), the same for all exits, and {exit: [map [B, C, h, w]]}. Attention
            always gets a padding mask, as in the reference. The GFLOPs depend on this.
        """
        x, pos, padding = self._encoder_input(features)
        return (pos, padding), self.transformer.encoder([x], [pos], exits, [padding])

    def start(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], list[Tensor], EncoderState]:
        """((position code, padding) as in `encode`, [the encoder's input], its state before the first layer)."""
        x, pos, padding = self._encoder_input(features)
        return (pos, padding), [x], self.transformer.encoder.start([x], [pos], [padding])

    def advance(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        """See `ExitEncoder.advance`."""
        return self.transformer.encoder.advance(state, exit)

    def _encoder_input(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The projected map [B, C, h, w], its position code, and its padding [B, h, w]."""
        x = self.projected(features)
        padding = features.get("padding")
        if padding is None:
            padding = x.new_zeros(len(x), *x.shape[-2:], dtype=torch.bool)
        return x, padded_sine_position(padding, x.shape[1]).to(x.dtype), padding

    def decode(self, shared: tuple[Tensor, Tensor], maps: Sequence[Tensor], aux: bool = True) -> dict:
        """The prediction of one exit, from the results of `encode`.

        Returns:
            pred_logits [B, Q, C + 1] and pred_boxes [B, Q, 4], (centre x, centre y, width, height) as fractions of the
            image's size. With `aux` also aux_outputs: the same of each decoder layer but the last.
        """
        pos, padding = shared
        memory, pos = (m.flatten(2).transpose(1, 2) for m in (maps[0], pos))  # [B, S, C]
        decoder, allowed = self.transformer.decoder, allowed_tokens([padding])
        *before, last = (self._predict(x) for x in decoder(self.query_embed.weight, memory, pos, allowed, aux))
        return {**last, "aux_outputs": before} if aux else last

    def _predict(self, x: Tensor) -> dict[str, Tensor]:
        return {"pred_logits": self.class_embed(x), "pred_boxes": self.bbox_embed(x).sigmoid()}
