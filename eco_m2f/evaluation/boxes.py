"""Box AP by COCO's definition, through pycocotools: of a dataset, and of one image for Step B."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.annotations import read_registered
from ..data.categories import check_same_categories, registered_categories
from .collect import RowEvaluator
from .instance import average_precision, coco_of, mean_precision, result_set


class BoxGroundTruth:
    """COCO's box annotation by image id, in the category ids of the dataset's own file.

    Raises ValueError where the metadata names no `json_file`, or the file is missing, wrong or of other categories.
    """

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.json_file = getattr(self.metadata, "json_file", None)
        if not self.json_file or getattr(self.metadata, "panoptic_json", None):
            raise ValueError(f"dataset {dataset_name!r} has no json_file of boxes: is it a detection dataset?")
        content = read_registered(self.metadata)
        self.categories = sorted((c.as_dict() for c in content.categories), key=lambda c: c["id"])
        registered = registered_categories(self.metadata)
        check_same_categories(registered, self.categories, f"dataset {self.name!r}", self.json_file)
        # the order of detectron2's contiguous ids
        self.dataset_id = dict(enumerate(c["id"] for c in self.categories))
        self._objects: dict = {image.id: [] for image in content.images}
        for annotation in content.annotations:
            self._objects[annotation.image_id].append(annotation)

    def objects(self, image_id) -> list[dict]:
        """COCO's annotations (bbox x y w h, category_id, area, iscrowd) of an image."""
        if image_id not in self._objects:
            raise ValueError(f"image {image_id!r} is not in {self.json_file}: is the dataset the right one?")
        return [annotation.as_dict() for annotation in self._objects[image_id]]

    def coco(self) -> COCO:
        """All images and objects for pycocotools."""
        objects = [{"image_id": i, **o.as_dict()} for i, of_image in self._objects.items() for o in of_image]
        return coco_of([{"id": i} for i in self._objects], self.categories, objects)

    def detections(self, image_id, instances: Instances) -> list[dict]:
        """Predictions in COCO's result format."""
        return [{"image_id": image_id, **d} for d in to_detections(instances, self.dataset_id)]


def to_detections(instances: Instances, dataset_id: Mapping[int, int]) -> list[dict]:
    """category_id (the dataset's), bbox x y w h, score of each instance."""
    corners = instances.pred_boxes.tensor.cpu().double().numpy()
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return [
        {"category_id": dataset_id[c], "bbox": box, "score": score}
        for box, score, c in zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist())
    ]


class BoxTarget:
    """The objects of one image, prepared to be compared with the detections of any number of exits."""

    def __init__(self, objects: Sequence[Mapping], max_detections: int = 100):
        self._categories = sorted({o["category_id"] for o in objects if not o.get("iscrowd", 0)})
        self._max_detections = max_detections
        categories = [{"id": c} for c in sorted({o["category_id"] for o in objects})]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            self._truth = coco_of([{"id": 0}], categories, [_shape(o) for o in objects])

    def ap(self, detections: Sequence[Mapping]) -> float:
        """AP@[.5:.95] of this image alone, in [0, 1]: the mean over the categories it has objects of.

        detections: category_id, bbox x y w h, score. As in COCO, a detection of a category that the image has no
        object of does not count, nor does one that lies in a crowd of its own.
        An image without objects (crowds aside) has no AP: it counts as 0 at every exit, so that no exit is worth
        more than another, and the cheapest is its target.
        """
        if not self._categories:
            return 0.0
        wanted = [{**d, "image_id": 0} for d in detections if d["category_id"] in self._categories]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, result_set(self._truth, wanted), "bbox")
            p = evaluation.params
            p.imgIds, p.catIds, p.maxDets = [0], self._categories, [self._max_detections]
            p.areaRng, p.areaRngLbl = p.areaRng[:1], p.areaRngLbl[:1]  # all sizes
            evaluation.evaluate()
            evaluation.accumulate()
        return mean_precision(evaluation.eval["precision"])


def _shape(o: Mapping) -> dict:
    """An object of an image of id 0."""
    area = o["bbox"][2] * o["bbox"][3]
    kept = {k: o[k] for k in ("category_id", "bbox", "area", "iscrowd") if k in o}
    return {"image_id": 0, "iscrowd": 0, "area": area, **kept}


class BoxEvaluator(RowEvaluator):
    """Reads `instances` of the outputs: pred_boxes (pixels), scores, pred_classes (contiguous).

    `evaluate` returns {"bbox": {AP, AP50, AP75, APs, APm, APl, AP_image, AP-<class>}} in percent, NaN where no object
    of that kind exists; AP_image is the mean over the images of `BoxTarget.ap`. With an output_dir it also writes
    `boxes.json`, with each image's own AP. `max_detections` is COCO's limit per image and class; 100 is official.
    """

    def __init__(self, ground_truth: BoxGroundTruth, output_dir: str | None = None, max_detections: int = 100):
        self._ground_truth = ground_truth
        self._max_detections = max_detections
        super().__init__(output_dir)

    def row(self, x: Mapping, y: Mapping) -> tuple[list[dict], float]:
        detections = self._ground_truth.detections(x["image_id"], y["instances"])
        return detections, BoxTarget(self._ground_truth.objects(x["image_id"]), self._max_detections).ap(detections)

    def summary(self, rows: dict) -> dict:
        detections = [d for found, _ in rows.values() for d in found]
        per_image = {str(image_id): ap for image_id, (_, ap) in rows.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            truth = self._ground_truth.coco()
            result = average_precision(truth, detections, list(rows), self._max_detections, "bbox")
        result["AP_image"] = 100 * float(np.mean(list(per_image.values()))) if per_image else float("nan")
        summary = {key: None if np.isnan(value) else value / 100 for key, value in result.items()}
        self.write("boxes.json", {**summary, "per_image_ap": per_image})
        self.write("boxes_predictions.json", detections)
        return {"bbox": result}
