"""From DETR's queries to detections."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert


@dataclass(frozen=True)
class BoxPostProcessor:
    """A query's class is its most probable one except "no object"; the score is its probability. No suppression."""

    detections_per_image: int = 100
    resizes_masks: ClassVar[bool] = False

    def __call__(self, logits: Tensor, boxes: Tensor, output_size: tuple[int, int]) -> Instances:
        """
        Args:
            logits: [Q, C + 1]; boxes: [Q, 4], (centre x, centre y, width, height) as fractions of the image's size.
            output_size: (height, width) of the result.

        Returns:
            pred_boxes (corners in pixels, inside the image), scores and pred_classes, by falling score.
        """
        scores, classes = logits.float().softmax(-1)[:, :-1].max(-1)  # [Q], [Q]
        best = scores.argsort(descending=True, stable=True)[: self.detections_per_image]
        height, width = output_size
        corners = box_convert(boxes[best].float(), "cxcywh", "xyxy")  # [best, 4]
        result = Instances((height, width))
        result.pred_boxes = Boxes(corners * torch.tensor([width, height, width, height], device=corners.device))
        result.pred_boxes.clip((height, width))
        result.scores = scores[best]
        result.pred_classes = classes[best]
        return result
