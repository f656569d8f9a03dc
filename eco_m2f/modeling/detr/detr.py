"""DETR, the parent for boxes, as a detectron2 meta-architecture. It knows nothing of exits."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..parent import Parent
from .criterion import BoxCriterion, BoxMatcher
from .head import DetrHead
from .postprocessing import BoxPostProcessor


@META_ARCH_REGISTRY.register()
class Detr(Parent):
    """DETR (Carion et al., ECCV 2020) for object detection.

    Results per image: `instances` with pred_boxes (in pixels of the output), scores and pred_classes.
    """

    head_name = "detr"
    annotation = "boxes"
    cost_parts = {"encoder": "detr.transformer.encoder.", "decoder": "detr.transformer.decoder."}

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        detr: DetrHead,
        criterion: BoxCriterion,
        postprocessor: BoxPostProcessor,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        super().__init__()
        self.backbone = backbone
        self.detr = detr
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.set_input(0, pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "detr": DetrHead(cfg, backbone.output_shape()),
            "criterion": build_criterion(cfg),
            "postprocessor": BoxPostProcessor(cfg.TEST.DETECTIONS_PER_IMAGE),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def extract(self, images: ImageList) -> dict[str, Tensor]:
        """The backbone's maps, and the "padding" of the coarsest, [B, h, w] bool."""
        features, name = super().extract(images), self.detr.coarsest
        stride = self.backbone.output_shape()[name].stride
        return {**features, "padding": padded_tokens(features[name], images.image_sizes, stride)}

    def prepare_targets(self, batched_inputs: list[dict], size: tuple[int, int]) -> list[dict]:
        """labels [G] and boxes [G, 4] of each image, as fractions of its own size without padding."""
        targets = []
        for x in batched_inputs:
            instances = x["instances"].to(self.device)
            height, width = instances.image_size
            scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=self.device)
            boxes = box_convert(instances.gt_boxes.tensor / scale, "xyxy", "cxcywh")
            targets.append({"labels": instances.gt_classes, "boxes": boxes})
        return targets

    def postprocess(self, pred: dict, images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        """The detections of each image, at the size that its input asks for."""
        return [
            {"instances": self.postprocessor(logits, boxes, self.output_size(x, size))}
            for logits, boxes, size, x in zip(
                pred["pred_logits"], pred["pred_boxes"], images.image_sizes, batched_inputs
            )
        ]


def padded_tokens(feature: Tensor, image_sizes: list[tuple[int, int]], stride: int) -> Tensor:
    """The tokens of a map [B, C, h, w] that no image covers, [B, h, w] bool. An image covers ceil(side / stride)."""
    padding = feature.new_ones(len(feature), *feature.shape[-2:], dtype=torch.bool)
    for row, (height, width) in zip(padding, image_sizes):
        row[: -(-int(height) // stride), : -(-int(width) // stride)] = False
    return padding


def build_criterion(cfg) -> BoxCriterion:
    """The losses of MODEL.DETR. The matcher has the same weights."""
    m = cfg.MODEL.DETR
    return BoxCriterion(
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        matcher=BoxMatcher(m.CLASS_WEIGHT, m.L1_WEIGHT, m.GIOU_WEIGHT),
        weights={"loss_ce": m.CLASS_WEIGHT, "loss_bbox": m.L1_WEIGHT, "loss_giou": m.GIOU_WEIGHT},
        no_object_weight=m.NO_OBJECT_WEIGHT,
        num_aux=m.DEC_LAYERS - 1 if m.DEEP_SUPERVISION else 0,
    )
