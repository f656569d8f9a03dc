"""Assignment of queries to targets, and the mask costs at points."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..layers import at_least_float32, pixel_centres

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv 1708.02002


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps [N, C, H, W] at points [N, P, 2], (x, y) in [0, 1] -> [N, C, P]. Zero outside."""
    return F.grid_sample(maps, 2 * points[:, None] - 1, mode="bilinear", align_corners=False)[:, :, 0]


def pairwise_mask_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each query and target, mean over points: [.., Q, P], [.., G, P] -> [.., Q, G].

    bce(x, t) = softplus(x) - t x, so one matrix product serves all pairs.
    """
    return (F.softplus(logits).sum(-1, keepdim=True) - logits @ targets.mT) / logits.shape[-1]


def pairwise_focal_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """The focal loss (`criterion.focal_loss`) of each query and target, mean over points.

    [.., Q, P], [.., G, P] -> [.., Q, G]
    """
    prob = logits.sigmoid()
    of_one = FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * F.softplus(-logits)  # where the target is 1
    of_zero = (1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * F.softplus(logits)
    return (of_zero.sum(-1, keepdim=True) + (of_one - of_zero) @ targets.mT) / logits.shape[-1]


def all_pixels(maps: Tensor) -> Tensor:
    """The pixel centres of maps [N, C, H, W], as points for `point_sample`: [N, H * W, 2]."""
    return pixel_centres(*maps.shape[-2:], maps.device, maps.dtype).expand(len(maps), -1, -1)


def pairwise_dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - dice, with +1 smoothing, of each query and target: [.., Q, P], [.., G, P] -> [.., Q, G]."""
    prob = logits.sigmoid()
    total = prob.sum(-1)[..., :, None] + targets.sum(-1)[..., None, :]
    return 1 - (2 * prob @ targets.mT + 1) / (total + 1)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each target's class: [.., Q, C + 1], [G] -> [.., Q, G]."""
    return -logits.softmax(-1)[..., labels]


def assign(costs: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """The matches of each output and image, from the costs [L, Q, G] of each image.

    scipy takes about 10 microseconds per image, less than a thread would cost.
    """
    # A diverging model gives NaN costs, which scipy refuses. Any matching will do: the loss is not finite either, and
    # the trainer then stops, with the iteration and the images.
    flat = torch.nan_to_num(torch.cat([cost.flatten() for cost in costs]), nan=1e6, posinf=1e6, neginf=-1e6).cpu()
    on_host = [part.view(cost.shape).numpy() for part, cost in zip(flat.split([c.numel() for c in costs]), costs)]
    pairs = [np.stack(linear_sum_assignment(matrix)) for cost in on_host for matrix in cost]  # [2, min(Q, G)]
    indices = torch.as_tensor(np.concatenate(pairs, axis=1), dtype=torch.int64).to(costs[0].device)  # [2, all pairs]
    parts = iter(indices.split([pair.shape[1] for pair in pairs], dim=1))
    by_image = [[tuple(next(parts)) for _ in cost] for cost in costs]
    return [list(matches) for matches in zip(*by_image)]


class HungarianMatcher(nn.Module):
    """Minimum-cost one-to-one matching of queries and targets, image by image."""

    def __init__(
        self,
        cost_class: float,
        cost_mask: float,
        cost_dice: float,
        num_points: int | None,
        pairwise_mask: Callable[[Tensor, Tensor], Tensor] = pairwise_mask_cost,
    ):
        """num_points: the number of random points at which masks are compared; None: all pixels of the prediction.

        pairwise_mask: (logits [.., Q, P], targets [.., G, P]) -> cost of each pair [.., Q, G].
        """
        super().__init__()
        self.pairwise_mask = pairwise_mask
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, outputs: list[dict], targets: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """(query indices, target indices) of each output and image, int64 on the prediction's device.

        outputs: predictions for the same targets: the decoder's last and auxiliary ones. All costs move to the host
        together, so the device waits only once.
        """
        costs = [
            self.cost(
                [output["pred_logits"][i] for output in outputs],
                [output["pred_masks"][i] for output in outputs],
                target["labels"],
                target["masks"],
            )
            for i, target in enumerate(targets)
        ]
        return assign(costs)

    def cost(
        self,
        logits: list[Tensor],
        masks: list[Tensor],
        labels: Tensor,
        target_masks: Tensor,
        points: Tensor | None = None,
    ) -> Tensor:
        """The cost matrices [L, Q, G] of one image, from the logits [Q, C + 1] and masks [Q, h, w] of L outputs.

        Each output has its own points, shared by all its pairs, unless points [L, P, 2] are given.
        """
        with torch.autocast(labels.device.type, enabled=False):
            masks, logits = [at_least_float32(m) for m in masks], at_least_float32(torch.stack(logits))
            if points is None and self.num_points is None:
                points = torch.cat([all_pixels(m[None]) for m in masks])
            elif points is None:
                points = torch.rand(len(masks), self.num_points, 2, device=labels.device, dtype=masks[0].dtype)
            sampled = torch.cat([point_sample(m[None], p[None]) for m, p in zip(masks, points)])  # [L, Q, P]
            target = point_sample(target_masks.to(sampled)[None], points.flatten(0, 1)[None])[0]  # [G, L * P]
            target = target.unflatten(1, points.shape[:2]).transpose(0, 1)  # [L, G, P]
            return (
                self.cost_mask * self.pairwise_mask(sampled, target)
                + self.cost_class * class_cost(logits, labels)
                + self.cost_dice * pairwise_dice_cost(sampled, target)
            )
