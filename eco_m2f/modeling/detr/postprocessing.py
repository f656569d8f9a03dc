"""From DETR's queries to detections."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert


@dataclass(frozen=True)
class BoxPostProcessor:
    """A query's class is its most probable one but "no object", and that probability its score; no suppression."""

    detections_per_image: int = 100
    resizes_masks: ClassVar[bool] = False

    def __call__(self, logits: Tensor, boxes: Tensor, output_size: tuple[int, int]) -> Instances:
        """
        Args:
            logits: [Q, C + 1]; boxes: [Q, 4], (centre x, centre y, width, height) in parts of the image.
            output_size: (height, width) of the image that the boxes are wanted in.

        Returns:
            pred_boxes (corners in pixels, inside the image), scores, pred_classes; the most confident first.
        """
        scores, classes = logits.float().softmax(-1)[:, :-1].max(-1)
        best = scores.argsort(descending=True, stable=True)[: self.detections_per_image]
        height, width = output_size
        corners = box_convert(boxes[best].float(), "cxcywh", "xyxy")
        result = Instances((height, width))
        result.pred_boxes = Boxes(corners * torch.tensor([width, height, width, height], device=corners.device))
        result.pred_boxes.clip((height, width))
        result.scores = scores[best]
        result.pred_classes = classes[best]
        return result
