"""The segmentation head: pixel decoder, then predictor."""

from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from .parent import ExitHead
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(ExitHead):
    """Backbone maps -> class logits and mask logits, at one exit or at several."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        pixel_decoder: nn.Module,
        predictor: nn.Module,
        num_classes: int,
    ):
        super().__init__()
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        if former.TRANSFORMER_IN_FEATURE != "multi_scale_pixel_decoder":
            raise ValueError(
                "MASK_FORMER.TRANSFORMER_IN_FEATURE must be 'multi_scale_pixel_decoder' (Mask2Former); "
                f"got {former.TRANSFORMER_IN_FEATURE!r}, which is MaskFormer's"
            )
        shapes = {k: v for k, v in input_shape.items() if k in head.IN_FEATURES}
        return {
            "input_shape": shapes,
            "pixel_decoder": SEM_SEG_HEADS_REGISTRY.get(head.PIXEL_DECODER_NAME)(cfg, shapes),
            "predictor": TRANSFORMER_DECODER_REGISTRY.get(former.TRANSFORMER_DECODER_NAME)(
                cfg, head.CONVS_DIM, mask_classification=True
            ),
            "num_classes": head.NUM_CLASSES,
        }

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits of the pixel decoder's encoder, ascending."""
        return self.pixel_decoder.exits

    @property
    def projected_channels(self) -> int:
        return self.pixel_decoder.input_proj[0][0].out_channels

    def projected(self, features: dict[str, Tensor]) -> Tensor:
        """The coarsest of the encoder's input maps [B, C, h, w], before position and level embedding."""
        coarsest = self.pixel_decoder.encoder_in_features[0]
        return self.pixel_decoder.input_proj[0](features[coarsest].float())

    def encode(
        self, features: dict[str, Tensor], exits: Sequence[int]
    ) -> tuple[Tensor | None, dict[int, list[Tensor]]]:
        """See `MSDeformAttnPixelDecoder.encode`."""
        return self.pixel_decoder.encode(features, exits)

    def decode(self, lateral: Tensor | None, maps: Sequence[Tensor], aux: bool = True) -> dict:
        """The prediction of one exit, from what `encode` gives; see `MultiScaleMaskedTransformerDecoder.forward`."""
        return self.predictor(maps, self.pixel_decoder.mask_branch(lateral, maps), aux)
