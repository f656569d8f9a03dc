"""The AP of an image's masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .boxes import evaluated_ap
from .postprocessed import results_of
from .registry import QUALITY_REGISTRY


@dataclass(frozen=True)
class PackedMasks:
    """Predicted things for a worker: masks of one bit per pixel, contiguous classes and scores."""

    width: int
    bits: np.ndarray  # [N, H, ceil(W / 8)] uint8
    classes: list[int]
    scores: list[float]

    def masks(self) -> np.ndarray:
        return np.unpackbits(self.bits, axis=-1, count=self.width)  # [N, H, W] uint8


@QUALITY_REGISTRY.register()
class MaskAP:
    """COCO's AP@[.5:.95] of the masks of an image's things. It is no sum over images, as `BoxAP`.

    The ground truth is that of `InstanceEvaluator`: the dataset's instance JSON, or else the things of its panoptic
    annotation.
    """

    name = "mask_AP"
    annotation = "panoptic"
    files = ("pan_seg_file_name",)
    category_keys = ()
    columns = {"quality": "mean mask AP of an image"}
    exact = None
    result_file = "instances.json"
    evaluated_columns = {"evaluated_ap": "evaluated mean mask AP", "dataset_ap": "mask AP of the dataset"}
    switch = "MODEL.MASK_FORMER.TEST.INSTANCE_ON"

    def __init__(self, truth):
        self.truth = truth  # see `InstanceGroundTruth`

    @classmethod
    def of(cls, dataset_name: str) -> "MaskAP":
        from .ground_truth import PanopticGroundTruth
        from .instance_ground_truth import InstanceGroundTruth

        panoptic = PanopticGroundTruth(dataset_name)
        if getattr(panoptic.metadata, "evaluator_type", None) == "cityscapes_panoptic_seg":
            raise ValueError(
                f"MODEL.ECO.QUALITY MaskAP is COCO's AP, but {dataset_name!r} is evaluated by Cityscapes' own AP: "
                "choose PanopticQuality or MeanIoU"
            )
        return cls(InstanceGroundTruth(panoptic))

    @property
    def categories(self) -> list[dict]:
        return self.truth.panoptic.categories

    def prepare(self, model, pred: Mapping, images, x: Mapping) -> PackedMasks:
        """The masks of things, whatever MODEL.MASK_FORMER.TEST turns on."""
        only = {"semantic_on": False, "instance_on": True, "panoptic_on": False, "resize_first": True}
        found = results_of(model, pred, images, x, **only)["instances"]
        things = found.pred_classes.new_tensor(self.truth.thing_classes)
        found = found[(found.pred_classes[:, None] == things).any(dim=1)]
        masks = found.pred_masks.cpu().bool().numpy()  # [N, H, W]
        bits = np.packbits(masks, axis=-1)  # [N, H, ceil(W / 8)]
        return PackedMasks(masks.shape[-1], bits, found.pred_classes.tolist(), found.scores.tolist())

    def comparison(self, x: Mapping):
        return partial(_compare, self.truth.image(x["image_id"]), self.truth.panoptic.dataset_id)

    @staticmethod
    def mirrored(prediction: PackedMasks, width: int) -> PackedMasks:
        return replace(prediction, bits=np.packbits(prediction.masks()[..., ::-1], axis=-1))

    @staticmethod
    def evaluated(content: Mapping) -> dict[str, float]:
        return evaluated_ap(content)


def _compare(image, dataset_id: Mapping[int, int], predictions: Sequence[PackedMasks]) -> list[tuple[float, None]]:
    from .average_precision import ObjectComparison, encode

    most = max((len(packed.scores) for packed in predictions), default=0)
    size = predictions[0].bits.shape[1], predictions[0].width
    comparison = ObjectComparison(image.objects(size), "segm", max(most, 1))

    def detections(packed: PackedMasks) -> list[dict]:
        return [
            {"category_id": dataset_id[c], "segmentation": encode(mask), "score": score}
            for mask, c, score in zip(packed.masks(), packed.classes, packed.scores)
        ]

    return [(comparison.ap(detections(packed)), None) for packed in predictions]
