"""Assignment of queries to ground-truth masks, and the point-wise mask costs."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .layers import at_least_float32


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps [N, C, H, W] at points [N, P, 2], (x, y) in [0, 1] -> [N, C, P]; zero outside."""
    return F.grid_sample(maps, 2 * points[:, None] - 1, mode="bilinear", align_corners=False)[:, :, 0]


def pairwise_mask_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every query against every target, mean over points: [Q, P], [G, P] -> [Q, G].

    bce(x, t) = softplus(x) - t x, so one matrix product does for all pairs.
    """
    return (F.softplus(logits).sum(1, keepdim=True) - logits @ targets.T) / logits.shape[1]


def pairwise_dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - dice with +1 smoothing of every query against every target: [Q, P], [G, P] -> [Q, G]."""
    prob = logits.sigmoid()
    total = prob.sum(1)[:, None] + targets.sum(1)[None]
    return 1 - (2 * prob @ targets.T + 1) / (total + 1)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each target's class: [Q, C + 1], [G] -> [Q, G]."""
    return -logits.softmax(-1)[:, labels]


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the queries and of the targets whose pairs cost least in all: [Q, G] -> two of [min(Q, G)]."""
    # A diverging model gives NaN costs; scipy refuses them. Any matching will do: the loss is not finite either,
    # and the trainer stops on that with the iteration and the images.
    finite = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6).cpu()
    rows, columns = linear_sum_assignment(finite)
    return tuple(torch.as_tensor(i, dtype=torch.int64, device=cost.device) for i in (rows, columns))


class HungarianMatcher(nn.Module):
    """Minimum-cost one-to-one matching of queries and targets, image by image."""

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int):
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, pred: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """(query indices, target indices) of every image, int64 on the prediction's device."""
        costs = [
            self.cost(logits, masks, target["labels"], target["masks"])
            for logits, masks, target in zip(pred["pred_logits"], pred["pred_masks"], targets)
        ]
        return [assign(cost) for cost in costs]

    def cost(
        self, logits: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor, points: Tensor | None = None
    ) -> Tensor:
        """The cost matrix [Q, G] of one image, on random points shared by all pairs (or on `points` [1, P, 2])."""
        with torch.autocast(logits.device.type, enabled=False):
            masks, logits = at_least_float32(masks), at_least_float32(logits)
            if points is None:
                points = torch.rand(1, self.num_points, 2, device=masks.device, dtype=masks.dtype)
            sampled = point_sample(masks[None], points)[0]  # [Q, P]
            target = point_sample(target_masks.to(masks)[None], points)[0]  # [G, P]
            return (
                self.cost_mask * pairwise_mask_cost(sampled, target)
                + self.cost_class * class_cost(logits, labels)
                + self.cost_dice * pairwise_dice_cost(sampled, target)
            )
