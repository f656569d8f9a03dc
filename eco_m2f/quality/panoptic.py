"""The panoptic quality of an image."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from .panoptic_quality import PanopticComparison, dataset_pq, image_pq, pq_of_each, to_dataset_categories
from .postprocessed import on_host, results_of
from .registry import QUALITY_REGISTRY
from .statistics import ImageStatistics

PanopticPrediction = tuple[np.ndarray, list[dict]]  # ids [H, W], 0 for void; segments of contiguous categories


@QUALITY_REGISTRY.register()
class PanopticQuality:
    """PQ of an image, and its statistics, whose sums give the exact PQ of any choice of exits."""

    name = "PQ"
    annotation = "panoptic"
    files = ("pan_seg_file_name",)
    category_keys = ("isthing",)
    columns = {"pq": "PQ", "pq_things": "PQ_th", "pq_stuff": "PQ_st"}
    result_file = "panoptic.json"
    evaluated_columns = {"evaluated_pq": "evaluated PQ"}
    switch = "MODEL.MASK_FORMER.TEST.PANOPTIC_ON"

    def __init__(self, truth):
        self.truth = truth  # see `PanopticGroundTruth`

    @classmethod
    def of(cls, dataset_name: str) -> "PanopticQuality":
        from .ground_truth import PanopticGroundTruth

        return cls(PanopticGroundTruth(dataset_name))

    @property
    def categories(self) -> list[dict]:
        return self.truth.categories

    def prepare(self, model, pred: Mapping, images, x: Mapping) -> PanopticPrediction:
        """The panoptic map and its segments, whatever MODEL.MASK_FORMER.TEST turns on."""
        only = {"semantic_on": False, "instance_on": False, "panoptic_on": True, "resize_first": True}
        ids, segments = results_of(model, pred, images, x, **only)["panoptic_seg"]
        return on_host(ids, len(segments)), segments

    def comparison(self, x: Mapping):
        return partial(_compare, self.truth.image(x["image_id"]), self.truth.dataset_id)

    @staticmethod
    def mirrored(prediction: PanopticPrediction, width: int) -> PanopticPrediction:
        ids, segments = prediction
        return np.ascontiguousarray(ids[:, ::-1]), segments

    @staticmethod
    def exact(total: ImageStatistics, categories: Sequence[Mapping]) -> dict[str, float]:
        result = dataset_pq(total, categories)
        return {column: result[group]["pq"] for column, group in zip(PanopticQuality.columns, _GROUPS)}

    @staticmethod
    def exact_each(ids: np.ndarray, sums: np.ndarray, categories: Sequence[Mapping]) -> dict[str, np.ndarray]:
        things = np.isin(ids, [c["id"] for c in categories if c["isthing"]])
        groups = (sums, sums[:, :, things], sums[:, :, ~things])
        return {column: pq_of_each(group) for column, group in zip(PanopticQuality.columns, groups)}

    @staticmethod
    def evaluated(content: Mapping) -> dict[str, float]:
        return {"evaluated_pq": 100 * content["All"]["pq"]}


_GROUPS = ("All", "Things", "Stuff")


def _compare(
    image, dataset_id: Mapping[int, int], predictions: Sequence[PanopticPrediction]
) -> list[tuple[float, ImageStatistics]]:
    comparison = PanopticComparison(image.id_map(), image.segments)
    found = [comparison.compare(ids, to_dataset_categories(segments, dataset_id)) for ids, segments in predictions]
    return [(image_pq(statistics), statistics) for statistics in found]
