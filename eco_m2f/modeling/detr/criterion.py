"""DETR's losses for one prediction and its targets. They know no exits.

Boxes are (centre x, centre y, width, height), as fractions of the image's width and height.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from ..layers import at_least_float32
from ..mask2former.criterion import QueryCriterion
from ..mask2former.matcher import assign, class_cost


class BoxMatcher(nn.Module):
    """Minimum-cost one-to-one matching of queries and target boxes, image by image (DETR, section 3.1)."""

    def __init__(self, cost_class: float, cost_l1: float, cost_giou: float):
        super().__init__()
        self.cost_class, self.cost_l1, self.cost_giou = cost_class, cost_l1, cost_giou

    @torch.no_grad()
    def forward(self, outputs: list[dict], targets: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """As `HungarianMatcher.forward`: (query indices, target indices) of each output and image."""
        logits = torch.stack([output["pred_logits"] for output in outputs], dim=1)  # [B, L, Q, C + 1]
        boxes = torch.stack([output["pred_boxes"] for output in outputs], dim=1)  # [B, L, Q, 4]
        return assign([self.cost(lo, b, t["labels"], t["boxes"]) for lo, b, t in zip(logits, boxes, targets)])

    def cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        """The cost matrices of one image: [L, Q, G] of L outputs, or [Q, G] of one.

        logits [.., Q, C + 1], boxes [.., Q, 4], labels [G], target_boxes [G, 4].
        """
        logits, boxes = at_least_float32(logits), at_least_float32(boxes)
        target_boxes = target_boxes.to(boxes)
        overlap = generalized_box_iou(_corners(boxes.flatten(0, -2)), _corners(target_boxes))  # [L * Q, G]
        return (
            self.cost_class * class_cost(logits, labels)
            + self.cost_l1 * torch.cdist(boxes, target_boxes, p=1)
            - self.cost_giou * overlap.view(*boxes.shape[:-1], len(target_boxes))
        )


class BoxCriterion(QueryCriterion):
    """The losses loss_ce, loss_bbox (L1) and loss_giou. Targets hold labels [G] and boxes [G, 4]."""

    def matched_losses(self, pred: dict, targets: list[dict], matches, num_boxes) -> dict[str, Tensor]:
        """L1 and 1 - generalised IoU of the matched pairs, summed, / num_boxes."""
        with torch.autocast(pred["pred_boxes"].device.type, enabled=False):
            boxes = at_least_float32(pred["pred_boxes"])
            found = torch.cat([b[query] for b, (query, _) in zip(boxes, matches)])  # [N, 4]
            wanted = torch.cat([t["boxes"][gt] for t, (_, gt) in zip(targets, matches)]).to(found)  # [N, 4]
            # Without matches the sums are 0 and still depend on the prediction: all ranks of a distributed run must
            # back-propagate the same graph.
            l1 = (found - wanted).abs().sum()
            giou = generalized_box_iou_loss(_corners(found), _corners(wanted), reduction="sum")
            return {"loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")
