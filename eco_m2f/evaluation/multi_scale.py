"""Semantic segmentation from several views of an image: several sizes, each also mirrored."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..data.mappers import PanopticTestMapper
from ..data.transforms import ShortestEdge


class MultiScale(nn.Module):
    """The mean of a model's class scores over views of each image, as Mask2Former computes it with TEST.AUG.

    Maps a batch of inputs with `file_name`, `height` and `width` to results with only `sem_seg` [C, height, width]. The
    image is read again for each size. A model with exits chooses an exit for each view.
    """

    def __init__(self, model: nn.Module, mappers: Sequence[PanopticTestMapper], mirrored: bool):
        """mappers: one per size."""
        super().__init__()
        self.model = model
        self.mappers = mappers
        self.mirrored = mirrored

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "MultiScale":
        """Takes the sizes of TEST.AUG. Raises ValueError if semantic segmentation is not evaluated."""
        aug = cfg.TEST.AUG
        parent = getattr(model, "module", model)
        if getattr(parent, "annotation", "panoptic") == "boxes" or not cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON:
            raise ValueError(
                "TEST.AUG.ENABLED is for semantic segmentation only, which is not evaluated for this model: set it to "
                "False, or MODEL.MASK_FORMER.TEST.SEMANTIC_ON to True"
            )
        if not aug.MIN_SIZES:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: give the shortest edges in pixels")
        resize = [[ShortestEdge(size, aug.MAX_SIZE)] for size in aug.MIN_SIZES]
        mappers = [PanopticTestMapper(augmentations=r, image_format=cfg.INPUT.FORMAT) for r in resize]
        return cls(model, mappers, aug.FLIP)

    def forward(self, batched_inputs: list[Mapping]) -> list[dict[str, Tensor]]:
        return [{"sem_seg": self.mean(x)} for x in batched_inputs]

    def mean(self, x: Mapping) -> Tensor:
        total, count = torch.zeros(()), 0
        for mapper in self.mappers:
            image = mapper({key: x[key] for key in ("file_name", "height", "width") if key in x})["image"]
            for is_mirrored in (False, True)[: 1 + self.mirrored]:
                view = {**x, "image": image.flip(-1) if is_mirrored else image}
                scores = self.model([view])[0]["sem_seg"]
                total = total.to(scores.device) + (scores.flip(-1) if is_mirrored else scores)
                count += 1
        return total / count
