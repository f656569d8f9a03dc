"""The parent: Mask2Former as a detectron2 meta-architecture. It knows nothing of exits."""

import dataclasses
from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from detectron2.structures import ImageList
from torch import nn

from ...data.classes import dataset_classes
from ..parent import Parent
from .criterion import SetCriterion, focal_loss, mask_loss
from .matcher import HungarianMatcher, pairwise_focal_cost, pairwise_mask_cost
from .postprocessing import PostProcessor

# MODEL.MASK_FORMER.MASK_LOSS -> (loss, the matcher's cost, True: at random points, False: at all pixels)
MASK_LOSSES = {
    "cross_entropy": (mask_loss, pairwise_mask_cost, True),
    "focal": (focal_loss, pairwise_focal_cost, False),
}


@META_ARCH_REGISTRY.register()
class MaskFormer(Parent):
    """Mask2Former for panoptic, instance and semantic segmentation. With other parts it is MaskFormer.

    Results per image, as the config asks: sem_seg [C, H, W], panoptic_seg (int32 [H, W], segments), instances.
    """

    head_name = "sem_seg_head"
    annotation = "panoptic"
    cost_parts = {"pixel_decoder": "sem_seg_head.pixel_decoder.", "predictor": "sem_seg_head.predictor"}

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: SetCriterion,
        postprocessor: PostProcessor,
        size_divisibility: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.set_input(size_divisibility, pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": build_criterion(cfg),
            "postprocessor": build_postprocessor(cfg),
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def set_classes(self, classes: Sequence[dict]) -> None:
        """Also sets which classes are things. Raises ValueError unless there is one entry per class of the model."""
        if len(classes) != self.postprocessor.num_classes:
            raise ValueError(
                f"{len(classes)} classes ({', '.join(c['name'] for c in classes[:5])}, ...) for a model of "
                f"{self.postprocessor.num_classes}: set MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(classes)}"
            )
        super().set_classes(classes)
        things = frozenset(i for i, c in enumerate(classes) if c["isthing"])
        self.postprocessor = dataclasses.replace(self.postprocessor, thing_classes=things)

    def prepare_targets(self, batched_inputs: list[dict], size: tuple[int, int]) -> list[dict]:
        """labels [G] and masks [G, H, W] of each image, padded to the batch's size."""
        targets = []
        for x in batched_inputs:
            instances = x["instances"].to(self.device)
            masks = getattr(instances.gt_masks, "tensor", instances.gt_masks)
            padded = masks.new_zeros(len(masks), *size)
            padded[:, : masks.shape[1], : masks.shape[2]] = masks
            targets.append({"labels": instances.gt_classes, "masks": padded})
        return targets

    def postprocess(self, pred: dict, images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        """The results of each image, at the size that its input asks for."""
        padded = tuple(images.tensor.shape[-2:])
        results = []
        for logits, masks, size, x in zip(pred["pred_logits"], pred["pred_masks"], images.image_sizes, batched_inputs):
            results.append(self.postprocessor(logits, masks, padded, size, self.output_size(x, size)))
        return results


def build_criterion(cfg) -> SetCriterion:
    """The losses of MODEL.MASK_FORMER, times SEM_SEG_HEAD.LOSS_WEIGHT."""
    m, scale = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT
    if m.MASK_LOSS not in MASK_LOSSES:
        raise ValueError(f"MODEL.MASK_FORMER.MASK_LOSS {m.MASK_LOSS!r} is unknown; there are {list(MASK_LOSSES)}")
    loss, cost, at_points = MASK_LOSSES[m.MASK_LOSS]
    num_points = m.TRAIN_NUM_POINTS if at_points else None
    weights = {"loss_ce": m.CLASS_WEIGHT, "loss_mask": m.MASK_WEIGHT, "loss_dice": m.DICE_WEIGHT}
    return SetCriterion(
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        matcher=HungarianMatcher(m.CLASS_WEIGHT, m.MASK_WEIGHT, m.DICE_WEIGHT, num_points, cost),
        weights={name: w * scale for name, w in weights.items()},
        no_object_weight=m.NO_OBJECT_WEIGHT,
        num_points=num_points,
        oversample_ratio=m.OVERSAMPLE_RATIO,
        importance_sample_ratio=m.IMPORTANCE_SAMPLE_RATIO,
        num_aux=m.DEC_LAYERS - 1 if m.DEEP_SUPERVISION else 0,
        mask_loss=loss,
    )


def build_postprocessor(cfg) -> PostProcessor:
    """The post-processing that MODEL.MASK_FORMER.TEST asks for. A registered dataset tells which classes are things."""
    test = cfg.MODEL.MASK_FORMER.TEST
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    classes = dataset_classes(names[0])[:num_classes] if names else []
    things = frozenset(i for i, c in enumerate(classes) if c["isthing"])
    return PostProcessor(
        num_classes=num_classes,
        thing_classes=things if classes else None,
        semantic_on=test.SEMANTIC_ON,
        panoptic_on=test.PANOPTIC_ON,
        instance_on=test.INSTANCE_ON,
        object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
        overlap_threshold=test.OVERLAP_THRESHOLD,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        resize_first=test.PANOPTIC_ON or test.INSTANCE_ON or test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
    )
