"""What Step B measures of one image at one exit: a quality measure per kind of annotation.

A measure has a `name`, the `categories` of its dataset, and `target(image_id)`: a function, prepared once per image,
from a prediction (what the meta-architecture's `judged` returns) to (quality in [0, 1], higher is better; statistics
that the quality of a whole dataset is a sum of, or None where it is no such sum). It is made by `Measure.of(dataset)`.
"""

from collections.abc import Callable

from detectron2.structures import Instances
from torch import Tensor

from .boxes import BoxGroundTruth, BoxTarget
from .ground_truth import PanopticGroundTruth
from .panoptic_quality import ImageStatistics, PanopticTarget, to_dataset_categories


class PanopticMeasure:
    """PQ of an image, and the statistics that make the PQ of any choice of exits exact."""

    name = "PQ"

    def __init__(self, truth: PanopticGroundTruth):
        self.truth = truth

    @classmethod
    def of(cls, dataset_name: str) -> "PanopticMeasure":
        return cls(PanopticGroundTruth(dataset_name))

    @property
    def categories(self) -> list[dict]:
        return self.truth.categories

    def target(self, image_id) -> Callable[[tuple[Tensor, list[dict]]], tuple[float, ImageStatistics]]:
        target = PanopticTarget(self.truth.id_map(image_id), self.truth.segments(image_id))

        def compare(prediction: tuple[Tensor, list[dict]]) -> tuple[float, ImageStatistics]:
            panoptic, segments = prediction
            statistics = target.compare(panoptic.cpu().numpy(), to_dataset_categories(segments, self.truth.dataset_id))
            return statistics.pq(), statistics

        return compare


class BoxMeasure:
    """AP@[.5:.95] of the boxes of an image; see `BoxTarget.ap` for images without objects.

    The AP of a dataset ranks the detections of all images together and is no sum over images. So a choice of exits is
    judged by the mean over the images, which `BoxEvaluator` calls AP_image.
    """

    name = "AP"

    def __init__(self, truth: BoxGroundTruth):
        self.truth = truth

    @classmethod
    def of(cls, dataset_name: str) -> "BoxMeasure":
        return cls(BoxGroundTruth(dataset_name))

    @property
    def categories(self) -> list[dict]:
        return self.truth.categories

    def target(self, image_id) -> Callable[[Instances], tuple[float, None]]:
        target = BoxTarget(self.truth.objects(image_id))
        return lambda instances: (target.ap(self.truth.detections(image_id, instances)), None)
