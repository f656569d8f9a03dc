"""The segmentation head: pixel decoder, then predictor."""

from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(nn.Module):
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

    def forward(self, features: dict[str, Tensor]) -> dict:
        """The prediction after the last encoder layer; see `MultiScaleMaskedTransformerDecoder.forward`."""
        last = self.exits[-1]
        return self.forward_exits(features, [last])[last]

    def forward_exits(self, features: dict[str, Tensor], exits: Sequence[int]) -> dict[int, dict]:
        """{exit: prediction}; the encoder runs once, the predictor once per exit."""
        lateral, maps = self.pixel_decoder.encode(features, exits)
        return {k: self.decode(lateral, maps[k]) for k in sorted(maps)}

    def decode(self, lateral: Tensor | None, maps: Sequence[Tensor]) -> dict:
        """The prediction of one exit, from what `MSDeformAttnPixelDecoder.encode` gives."""
        return self.predictor(maps, self.pixel_decoder.mask_branch(lateral, maps))
