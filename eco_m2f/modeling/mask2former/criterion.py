"""Mask2Former's losses for one prediction and its targets. They know no exits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from ..layers import at_least_float32
from .matcher import FOCAL_ALPHA, FOCAL_GAMMA, HungarianMatcher, all_pixels, point_sample


def mask_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor) -> Tensor:
    """Binary cross-entropy, mean over points, summed over masks, / num_masks: [N, P], [N, P] -> scalar."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(1).sum() / num_masks


def focal_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002), mean over points, summed over masks, / num_masks.

    [N, P], [N, P] -> scalar. A point with target t and predicted probability p of t costs
    alpha_t (1 - p)^gamma (-log p). alpha_t is alpha for t = 1, and 1 - alpha for t = 0.
    """
    loss = sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA)
    return loss.mean(1).sum() / num_masks


def dice_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor) -> Tensor:
    """1 - dice with +1 smoothing, summed over masks, / num_masks: [N, P], [N, P] -> scalar."""
    prob = logits.sigmoid()
    dice = (2 * (prob * targets).sum(1) + 1) / (prob.sum(1) + targets.sum(1) + 1)  # [N]
    return (1 - dice).sum() / num_masks


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points where masks are uncertain (PointRend): [N, 1, H, W] -> [N, num_points, 2], (x, y) in [0, 1].

    Draws oversample_ratio * num_points uniform points and keeps the importance_ratio * num_points with the smallest
    |logit|. New uniform points fill the rest.
    """
    n, device = logits.shape[0], logits.device
    num_kept = int(importance_ratio * num_points)
    candidates = torch.rand(n, int(oversample_ratio * num_points), 2, device=device, dtype=logits.dtype)
    certainty = point_sample(logits, candidates)[:, 0].abs()  # [N, P']
    kept = certainty.topk(num_kept, dim=1, largest=False, sorted=False).indices  # [N, num_kept]
    kept = candidates.gather(1, kept[..., None].expand(-1, -1, 2))  # [N, num_kept, 2]
    fresh = torch.rand(n, num_points - num_kept, 2, device=device, dtype=logits.dtype)
    return torch.cat((kept, fresh), dim=1)


class QueryCriterion(nn.Module):
    """Losses of queries matched one to one with targets, with deep supervision.

    The class loss is loss_ce; a subclass adds others in `matched_losses`. Losses of auxiliary outputs have the suffixes
    _0, _1.. All losses are unweighted; `weight_dict` holds their weights.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        matcher: nn.Module,
        weights: dict[str, float],
        no_object_weight: float,
        num_aux: int,
        persistent: bool = False,
    ):
        """matcher: (outputs, targets) -> per output and image, (query indices, target indices).
        persistent: whether the state dict holds the weights of the classes.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        suffixes = ["", *(f"_{i}" for i in range(num_aux))]
        self.weight_dict = {name + s: w for s in suffixes for name, w in weights.items()}
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight, persistent=persistent)

    def forward(self, pred: dict, targets: list[dict], num_targets: float | Tensor) -> dict[str, Tensor]:
        """
        Args:
            pred: pred_logits [B, Q, C + 1], the subclass's entries, and aux_outputs (may be missing).
            targets: per image, labels [G] int64 and the subclass's entries.
            num_targets: the mean number of targets per process, at least 1.
        """
        outputs = {"": pred, **{f"_{i}": aux for i, aux in enumerate(pred.get("aux_outputs", ()))}}
        losses = {}
        for (suffix, output), matches in zip(outputs.items(), self.matcher(list(outputs.values()), targets)):
            losses |= self._losses(output, targets, matches, num_targets, suffix)
        return losses

    def _losses(self, pred: dict, targets: list[dict], matches, num_targets, suffix: str) -> dict[str, Tensor]:
        others = self.matched_losses(pred, targets, matches, num_targets)
        losses = {"loss_ce": self._class_loss(pred["pred_logits"], targets, matches), **others}
        return {name + suffix: loss for name, loss in losses.items()}

    def matched_losses(self, pred: dict, targets: list[dict], matches, num_targets) -> dict[str, Tensor]:
        """The losses of the matched pairs by name. Without pairs, they are zeros that depend on the prediction."""
        raise NotImplementedError

    def _class_loss(self, logits: Tensor, targets: list[dict], matches) -> Tensor:
        """Cross-entropy over all queries. Unmatched queries have the target no-object, with a lower weight."""
        wanted = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)  # [B, Q]
        for row, target, (query, gt) in zip(wanted, targets, matches):
            row[query] = target["labels"][gt]
        logits = at_least_float32(logits)
        return F.cross_entropy(logits.transpose(1, 2), wanted, self.empty_weight.to(logits))


class SetCriterion(QueryCriterion):
    """The losses loss_ce, loss_mask and loss_dice of Mask2Former and MaskFormer.

    Predictions hold pred_masks [B, Q, h, w]. Targets hold masks [G, H, W] bool, padded to the batch's size.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        matcher: HungarianMatcher,
        weights: dict[str, float],
        no_object_weight: float,
        num_points: int | None,
        oversample_ratio: float,
        importance_sample_ratio: float,
        num_aux: int,
        mask_loss: Callable[[Tensor, Tensor, float | Tensor], Tensor] = mask_loss,
    ):
        """num_points: points per mask at which losses are computed; None: all pixels of the prediction.

        mask_loss: (logits [N, P], targets [N, P], num_masks) -> scalar; `mask_loss` or `focal_loss`.
        """
        super().__init__(
            num_classes,
            matcher=matcher,
            weights=weights,
            no_object_weight=no_object_weight,
            num_aux=num_aux,
            persistent=True,  # as in the published checkpoints
        )
        self.mask_loss = mask_loss
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio

    def matched_losses(self, pred: dict, targets: list[dict], matches, num_masks) -> dict[str, Tensor]:
        loss_mask, loss_dice = self._mask_losses(pred["pred_masks"], targets, matches, num_masks)
        return {"loss_mask": loss_mask, "loss_dice": loss_dice}

    def _mask_losses(self, masks: Tensor, targets: list[dict], matches, num_masks) -> tuple[Tensor, Tensor]:
        with torch.autocast(masks.device.type, enabled=False):
            masks = at_least_float32(masks)
            predicted = torch.cat([m[query] for m, (query, _) in zip(masks, matches)])[:, None]  # [N, 1, h, w]
            if len(predicted) == 0:
                # Keeps the graph: all ranks of a distributed run must back-propagate the same one.
                return predicted.sum() + masks.sum() * 0.0, masks.sum() * 0.0
            points = self._points(predicted)  # [N, P, 2]
            with torch.no_grad():
                wanted = torch.cat([t["masks"][gt] for t, (_, gt) in zip(targets, matches)])[:, None].to(predicted)
                wanted = point_sample(wanted, points)[:, 0]  # [N, P]
            logits = point_sample(predicted, points)[:, 0]  # [N, P]
            return self.mask_loss(logits, wanted, num_masks), dice_loss(logits, wanted, num_masks)

    def _points(self, masks: Tensor) -> Tensor:
        if self.num_points is None:
            return all_pixels(masks)
        return uncertain_points(masks, self.num_points, self.oversample_ratio, self.importance_sample_ratio)
