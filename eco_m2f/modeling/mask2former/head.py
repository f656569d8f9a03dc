"""The segmentation head: pixel decoder, then predictor."""

from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..encoders import EncoderState
from ..parent import ExitHead
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(ExitHead):
    """From the backbone's maps to class logits and mask logits, at one exit or several."""

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module):
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        predictor = TRANSFORMER_DECODER_REGISTRY.get(former.TRANSFORMER_DECODER_NAME)
        if former.TRANSFORMER_IN_FEATURE != predictor.in_feature:
            raise ValueError(
                f"MASK_FORMER.TRANSFORMER_IN_FEATURE must be {predictor.in_feature!r} for the {predictor.__name__}; "
                f"got {former.TRANSFORMER_IN_FEATURE!r}: set it, or another TRANSFORMER_DECODER_NAME"
            )
        shapes = {k: v for k, v in input_shape.items() if k in head.IN_FEATURES}
        return {
            "pixel_decoder": SEM_SEG_HEADS_REGISTRY.get(head.PIXEL_DECODER_NAME)(cfg, shapes),
            "predictor": predictor(cfg, head.CONVS_DIM, mask_classification=True),
        }

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits of the pixel decoder's encoder, ascending."""
        return self.pixel_decoder.exits

    @property
    def encoder_features(self) -> list[str]:
        return self.pixel_decoder.encoder_in_features

    @property
    def projected_channels(self) -> int:
        return self.pixel_decoder.input_proj[0][0].out_channels

    def projected(self, features: dict[str, Tensor]) -> Tensor:
        """The coarsest of the encoder's input maps [B, C, h, w], before position and level embedding."""
        return self.pixel_decoder.input_proj[0](features[self.coarsest].float())

    def encode(
        self, features: dict[str, Tensor], exits: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], dict[int, list[Tensor]]]:
        """See `MSDeformAttnPixelDecoder.encode`."""
        return self.pixel_decoder.encode(features, exits)

    def start(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor], EncoderState]:
        """See `MSDeformAttnPixelDecoder.start`."""
        return self.pixel_decoder.start(features)

    def advance(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        return self.pixel_decoder.advance(state, exit)

    def decode(self, laterals: Sequence[Tensor], maps: Sequence[Tensor], aux: bool = True) -> dict:
        """The prediction of one exit, from the results of `encode`; see `TRANSFORMER_DECODER_REGISTRY`."""
        return self.predictor(maps, self.pixel_decoder.mask_branch(laterals, maps), aux)
