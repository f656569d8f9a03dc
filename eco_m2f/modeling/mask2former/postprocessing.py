"""From the queries' class and mask logits to semantic, panoptic and instance results (Mask2Former, section 3.1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..layers import resize


@dataclass(frozen=True)
class PostProcessor:
    """Makes the results of an image from its prediction.

    Attributes:
        thing_classes: the contiguous ids of the thing classes; None: unknown, and panoptic maps are refused.
        object_mask_threshold: queries enter the panoptic map with scores above this.
        overlap_threshold: a segment is dropped if its visible fraction is below this.
        resize_first: resize the masks to the output size first; panoptic and instance results need this.
    """

    resizes_masks: ClassVar[bool] = True  # `costs` counts this

    num_classes: int
    thing_classes: frozenset[int] | None
    semantic_on: bool = True
    panoptic_on: bool = True
    instance_on: bool = True
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8
    detections_per_image: int = 100
    resize_first: bool = True

    def __call__(
        self,
        logits: Tensor,
        masks: Tensor,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> dict:
        """
        Args:
            logits: [Q, C + 1]; masks: [Q, h, w] logits at any resolution.
            padded_size: (H, W) of the batch; image_size: of this image in the batch; output_size: of the results.

        Returns:
            As switched on: sem_seg [C, H, W], panoptic_seg (int32 [H, W], 0 for void; segments_info), instances.
        """
        if self.panoptic_on and not (self.semantic_on or self.instance_on):
            keep = panoptic_queries(logits, self.object_mask_threshold)  # the other masks are not resized
            logits, masks = logits[keep], masks[keep]
        masks = resize_masks(masks, padded_size)
        if self.resize_first:
            masks = crop_and_resize(masks, image_size, output_size)
        logits = logits.float()
        result = {}
        if self.semantic_on:
            result["sem_seg"] = semantic_inference(logits, masks)
            if not self.resize_first:
                result["sem_seg"] = crop_and_resize(result["sem_seg"], image_size, output_size)
        if self.panoptic_on:
            result["panoptic_seg"] = self.panoptic(logits, masks)
        if self.instance_on:
            result["instances"] = self.instances(logits, masks)
        return result

    def panoptic(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, list[dict]]:
        if self.thing_classes is None:
            raise ValueError(
                "it is not known which classes are things: name the training dataset in DATASETS.TRAIN, or load "
                "a checkpoint that holds its classes"
            )
        return panoptic_inference(logits, masks, self.thing_classes, self.object_mask_threshold, self.overlap_threshold)

    def instances(self, logits: Tensor, masks: Tensor) -> Instances:
        only = self.thing_classes if self.panoptic_on else None
        return instance_inference(logits, masks, self.detections_per_image, only)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, [N, h, w] -> [N, *size], float32."""
    masks = masks.float()
    if masks.shape[-2:] == tuple(size):
        return masks  # bilinear resizing to the same size is the identity
    if len(masks) == 0:
        return masks.new_empty(0, *size)
    # Contiguous: maps made from tokens would be taken for channels last, and so would the result. Copying that takes
    # ten times as long on a CPU as resizing.
    return resize(masks[None].contiguous(), size)[0]


def crop_and_resize(masks: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Removes the padding, then resizes to the output size."""
    return resize_masks(masks[:, : image_size[0], : image_size[1]], output_size)


def semantic_inference(logits: Tensor, masks: Tensor) -> Tensor:
    """Class maps [C, H, W]: class probability times mask probability, summed over queries."""
    return torch.einsum("qc,qhw->chw", logits.softmax(-1)[:, :-1], masks.sigmoid())


def panoptic_queries(logits: Tensor, score_threshold: float) -> Tensor:
    """Which queries may own pixels of the panoptic map, [Q] bool: no no-object, and a score above the threshold."""
    scores, labels = logits.float().softmax(-1).max(-1)
    return (labels != logits.shape[1] - 1) & (scores > score_threshold)


def panoptic_inference(
    logits: Tensor, masks: Tensor, thing_classes: frozenset[int], score_threshold: float, overlap_threshold: float
) -> tuple[Tensor, list[dict]]:
    """Every pixel goes to the query with the largest score * mask probability, or to void.

    Returns:
        An int32 map [H, W] (0 = void) and its segments {id, isthing, category_id (contiguous)}. All stuff of a class is
        one segment.
    """
    keep = panoptic_queries(logits, score_threshold)
    scores, labels = logits[keep].softmax(-1).max(-1)
    num = len(scores)
    if num == 0:
        return torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device), []
    prob = (masks if num == len(masks) else masks[keep]).sigmoid()  # [num, H, W]
    owner = (scores[:, None, None] * prob).max(0).indices  # [H, W]; on a CPU twice as fast as argmax
    holds = prob.gather(0, owner[None])[0] >= 0.5  # [H, W], the owner's own mask
    visible = torch.where(holds, owner, num)  # [H, W]
    inside = prob.ge_(0.5).sum(2, dtype=torch.float32).sum(1, dtype=torch.int64)  # [num]; floats count a row exactly
    areas = (owner.flatten().bincount(minlength=num), inside, visible.flatten().bincount(minlength=num + 1)[:num])
    areas = torch.stack(areas).tolist()  # one transfer for all queries
    segments, segment_of = _segments(labels.tolist(), *areas, thing_classes, overlap_threshold)
    lookup = torch.tensor([*segment_of, 0], dtype=torch.int32, device=masks.device)
    return lookup[visible], segments


def _segments(labels, owned, original, visible, thing_classes, overlap_threshold) -> tuple[list[dict], list[int]]:
    """The segments, and the segment id of each query (0: none)."""
    segments, segment_of, stuff_ids = [], [0] * len(labels), {}
    for query, label in enumerate(labels):
        if not (owned[query] and original[query] and visible[query]):
            continue
        if owned[query] / original[query] < overlap_threshold:
            continue
        if label in stuff_ids:
            segment_of[query] = stuff_ids[label]
            continue
        segment_of[query] = len(segments) + 1
        if label not in thing_classes:
            stuff_ids[label] = segment_of[query]
        segments.append({"id": segment_of[query], "isthing": label in thing_classes, "category_id": label})
    return segments, segment_of


def instance_inference(
    logits: Tensor, masks: Tensor, num_detections: int, only_classes: frozenset[int] | None
) -> Instances:
    """The best (query, class) pairs. The score is the class probability times the mean probability inside the mask."""
    num_classes = logits.shape[1] - 1
    prob = logits.softmax(-1)[:, :-1].flatten()  # [Q * C]
    scores, pairs = prob.topk(min(num_detections, len(prob)), sorted=False)
    labels, queries = pairs % num_classes, pairs // num_classes
    if only_classes is not None:
        is_wanted = torch.zeros(num_classes, dtype=torch.bool, device=logits.device)
        is_wanted[sorted(only_classes)] = True
        keep = is_wanted[labels]
        scores, labels, queries = scores[keep], labels[keep], queries[keep]
    # A query may give several classes; its mask is scored once.
    used, position = queries.unique(return_inverse=True)
    binary = masks[used] > 0  # [used, H, W]
    inside = binary.flatten(1).float()
    quality = (masks[used].sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    result = Instances(tuple(masks.shape[-2:]))
    result.pred_masks = binary[position].float()
    result.pred_boxes = Boxes(torch.zeros(len(labels), 4, device=masks.device))
    result.scores = scores * quality[position]
    result.pred_classes = labels
    return result
