"""ECO-M2F: a MaskFormer with early exits."""

from dataclasses import replace

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor

from ..evaluation.quality import PanopticMeasure
from .early_exits import EarlyExits
from .maskformer import MaskFormer


@META_ARCH_REGISTRY.register()
class EcoMaskFormer(EarlyExits, MaskFormer):
    """Mask2Former with early exits (arXiv 2404.15244, section 3), judged by its panoptic quality."""

    measure = PanopticMeasure

    def judged(self, pred: dict, images: ImageList, x: dict) -> tuple[Tensor, list[dict]]:
        """The panoptic map and segments of a batch of one image, whatever else the config turns on."""
        only = replace(self.postprocessor, semantic_on=False, instance_on=False, panoptic_on=True, resize_first=True)
        size = images.image_sizes[0]
        padded = tuple(images.tensor.shape[-2:])
        wanted = self.output_size(x, size)
        return only(pred["pred_logits"][0], pred["pred_masks"][0], padded, size, wanted)["panoptic_seg"]
