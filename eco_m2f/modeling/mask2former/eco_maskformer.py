"""ECO-M2F: a MaskFormer with early exits."""

from dataclasses import replace

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList

from ...evaluation.quality import PanopticMeasure
from ..early_exits import EarlyExits
from .maskformer import MaskFormer


@META_ARCH_REGISTRY.register()
class EcoMaskFormer(EarlyExits, MaskFormer):
    """Mask2Former with early exits (arXiv 2404.15244, section 3), judged by its panoptic quality."""

    measure = PanopticMeasure

    def judged(self, pred: dict, images: ImageList, x: dict) -> tuple[np.ndarray, list[dict]]:
        """The panoptic map and segments of a batch of one image, whatever else the config turns on."""
        only = replace(self.postprocessor, semantic_on=False, instance_on=False, panoptic_on=True, resize_first=True)
        size = images.image_sizes[0]
        padded = tuple(images.tensor.shape[-2:])
        wanted = self.output_size(x, size)
        ids, segments = only(pred["pred_logits"][0], pred["pred_masks"][0], padded, size, wanted)["panoptic_seg"]
        return ids.to(torch.uint8 if len(segments) < 256 else torch.int32).cpu().numpy(), segments
