"""The ground truth of registered datasets: COCO's panoptic JSON and PNGs, class maps, or COCO's boxes."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..data.annotations import read_registered
from ..data.categories import SEMANTIC_TYPES, check_same_categories, registered_categories
from ..data.panoptic_map import index_map, read_classes, read_ids
from .panoptic_quality import contiguous_to_dataset_id

logger = logging.getLogger(__name__)


def _metadata(dataset_name: str):
    from detectron2.data import MetadataCatalog  # takes seconds; a worker process that reads images needs none of it

    return MetadataCatalog.get(dataset_name)


@dataclass(frozen=True)
class PanopticImage:
    """The panoptic ground truth of one image. The PNG is read on demand. It can be pickled.

    segments: id, category_id (of the file) and iscrowd (0 or 1) of each.
    """

    path: Path
    segments: list[dict]

    def id_map(self) -> np.ndarray:
        """[H, W] int32 segment ids, 0 for void. Raises DataError if PNG and JSON disagree."""
        listed = [s["id"] for s in self.segments]
        ids = read_ids(self.path, listed)
        index_map(ids, listed, self.path)
        return ids


class PanopticGroundTruth:
    """Panoptic ground truth by image id, in the category ids of the dataset's files.

    Reads `panoptic_json` of the dataset's metadata at once, and PNGs of `panoptic_root` on demand. Raises ValueError if
    the metadata lack a key, or the file is missing, damaged or of other categories.
    """

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.metadata = _metadata(dataset_name)
        for key in ("panoptic_json", "panoptic_root"):
            if not hasattr(self.metadata, key):
                raise ValueError(f"dataset {dataset_name!r} has no {key} in its metadata: is it a panoptic dataset?")
        content = read_registered(self.metadata)
        self.categories = [c.as_dict() for c in content.categories]
        registered = registered_categories(self.metadata)
        check_same_categories(registered, self.categories, f"dataset {self.name!r}", self.metadata.panoptic_json)
        self.dataset_id = contiguous_to_dataset_id(self.metadata)
        self.class_categories = registered  # in the order of the model's classes
        self._annotations = {a.image_id: a for a in content.annotations}

    def __len__(self) -> int:
        return len(self._annotations)

    def image_ids(self) -> list:
        """The annotated images, in the order of the JSON."""
        return list(self._annotations)

    def image(self, image_id) -> PanopticImage:
        """Raises ValueError for an image without annotation."""
        if image_id not in self._annotations:
            raise ValueError(
                f"image {image_id!r} is not in {self.metadata.panoptic_json}: is the dataset the right one?"
            )
        annotation = self._annotations[image_id]
        segments = [s.as_dict() for s in annotation.segments_info]
        return PanopticImage(Path(self.metadata.panoptic_root) / annotation.file_name, segments)

    def segments(self, image_id) -> list[dict]:
        """The segments of an image: id, category_id (the file's) and iscrowd of each."""
        return self.image(image_id).segments

    def id_map(self, image_id) -> np.ndarray:
        """See `PanopticImage.id_map`."""
        return self.image(image_id).id_map()

    def class_map_reader(self, x: Mapping) -> Callable[[], np.ndarray]:
        """A function that reads the [H, W] contiguous classes of an input. It can be pickled.

        They come from the input's `sem_seg_file_name`, or else from its panoptic annotation.
        """
        if "sem_seg_file_name" in x:
            return partial(read_class_map, x["sem_seg_file_name"])
        contiguous_id = {dataset: contiguous for contiguous, dataset in self.dataset_id.items()}
        ignore = getattr(self.metadata, "ignore_label", 255)
        return partial(_panoptic_classes, self.image(x["image_id"]), contiguous_id, ignore)

    def warn_if_partial(self, evaluated: int) -> None:
        """Logs a warning if not all images were evaluated."""
        if evaluated < len(self):
            logger.warning("%d of the %d annotated images of %s were evaluated", evaluated, len(self), self.name)


class SemanticGroundTruth:
    """The class maps of a dataset without other annotation: ADE20K, or Cityscapes' semantic split."""

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.class_categories = registered_categories(_metadata(dataset_name))

    def class_map_reader(self, x: Mapping) -> Callable[[], np.ndarray]:
        """See `PanopticGroundTruth.class_map_reader`."""
        return partial(read_class_map, x["sem_seg_file_name"])


ClassMaps = PanopticGroundTruth | SemanticGroundTruth


def class_maps_of(dataset_name: str) -> ClassMaps:
    """The ground truth of pixel classes. Raises ValueError for a dataset without class maps and panoptic annotation."""
    metadata = _metadata(dataset_name)
    if getattr(metadata, "evaluator_type", None) in SEMANTIC_TYPES:
        return SemanticGroundTruth(dataset_name)
    if not getattr(metadata, "panoptic_json", None):
        raise ValueError(
            f"dataset {dataset_name!r} has neither class maps nor panoptic annotation: choose another dataset, or "
            "another MODEL.ECO.QUALITY"
        )
    return PanopticGroundTruth(dataset_name)


class BoxGroundTruth:
    """COCO's boxes by image id, in the category ids of the dataset's file.

    Raises ValueError if the metadata has no `json_file`, or the file is missing, damaged or of other categories.
    """

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.metadata = _metadata(dataset_name)
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

    def image_ids(self) -> list:
        """The images, in the order of the JSON."""
        return list(self._objects)

    def objects(self, image_id) -> list[dict]:
        """COCO's annotations (bbox x y w h, category_id, area, iscrowd) of an image."""
        if image_id not in self._objects:
            raise ValueError(f"image {image_id!r} is not in {self.json_file}: is the dataset the right one?")
        return [annotation.as_dict() for annotation in self._objects[image_id]]


def read_class_map(path: str | Path) -> np.ndarray:
    """[H, W] int64 classes of a PNG."""
    return read_classes(path).astype(np.int64)


def _panoptic_classes(image: PanopticImage, contiguous_id: Mapping[int, int], ignore: int) -> np.ndarray:
    return semantic_map(image.id_map(), image.segments, contiguous_id, ignore)


def semantic_map(id_map: np.ndarray, segments: list[dict], contiguous_id: Mapping[int, int], ignore: int) -> np.ndarray:
    """[H, W] int64 contiguous classes of a panoptic map; `ignore` for void and for categories outside the mapping.

    A crowd gets the class of its category. The semantic annotation of COCO and Cityscapes does the same.
    """
    ids, inverse = np.unique(id_map, return_inverse=True)
    class_of = {s["id"]: contiguous_id.get(s["category_id"], ignore) for s in segments}
    return np.array([class_of.get(int(i), ignore) for i in ids], dtype=np.int64)[inverse].reshape(id_map.shape)
