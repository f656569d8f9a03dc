"""ECO-DETR: a DETR with early exits."""

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances

from ...evaluation.quality import BoxMeasure
from ..early_exits import EarlyExits
from .detr import Detr


@META_ARCH_REGISTRY.register()
class EcoDetr(EarlyExits, Detr):
    """DETR with early exits (arXiv 2404.15244, section 4), judged by the AP of its boxes, image by image."""

    measure = BoxMeasure

    def judged(self, pred: dict, images: ImageList, x: dict) -> Instances:
        """The detections of a batch of one image."""
        return self.postprocess(pred, images, [x])[0]["instances"].to("cpu")
