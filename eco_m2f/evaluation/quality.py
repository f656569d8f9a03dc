"""What Step B measures of one image at one exit: a quality measure per kind of annotation.

A measure has a `name`, the `categories` of its dataset, and `target(image_id)`: a function from the predictions of one
image, one per exit, as the meta-architecture's `judged` returns them, to one pair for each: (quality in [0, 1], higher
is better; statistics that the quality of a whole dataset is a sum of, or None where it is no such sum). The function
reads the image's annotation once, when it is called; it can be pickled, and so be called in another process. A measure
is made by `Measure.of(dataset)`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from detectron2.structures import Instances

from .boxes import BoxGroundTruth, BoxTarget, to_detections
from .ground_truth import PanopticGroundTruth, PanopticImage
from .panoptic_quality import ImageStatistics, PanopticTarget, to_dataset_categories

PanopticPrediction = tuple[np.ndarray, list[dict]]  # ids [H, W], 0 for void; segments of contiguous categories


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

    def target(self, image_id) -> Callable[[Sequence[PanopticPrediction]], list[tuple[float, ImageStatistics]]]:
        return partial(_compare_panoptic, self.truth.image(image_id), self.truth.dataset_id)


def _compare_panoptic(
    image: PanopticImage, dataset_id: Mapping[int, int], predictions: Sequence[PanopticPrediction]
) -> list[tuple[float, ImageStatistics]]:
    target = PanopticTarget(image.id_map(), image.segments)
    found = [target.compare(ids, to_dataset_categories(segments, dataset_id)) for ids, segments in predictions]
    return [(statistics.pq(), statistics) for statistics in found]


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

    def target(self, image_id) -> Callable[[Sequence[Instances]], list[tuple[float, None]]]:
        return partial(_compare_boxes, self.truth.objects(image_id), self.truth.dataset_id)


def _compare_boxes(
    objects: Sequence[Mapping], dataset_id: Mapping[int, int], predictions: Sequence[Instances]
) -> list[tuple[float, None]]:
    most = max((len(instances) for instances in predictions), default=0)  # TEST.DETECTIONS_PER_IMAGE has its say before
    target = BoxTarget(objects, max(most, 1))
    return [(target.ap(to_detections(instances, dataset_id)), None) for instances in predictions]
