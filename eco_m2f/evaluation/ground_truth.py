"""The annotation of a registered dataset: one JSON and a folder of PNGs, as COCO defines them, or class maps."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from ..data.annotations import read_registered
from ..data.categories import check_same_categories, registered_categories
from ..data.panoptic_map import index_map, read_classes, read_ids
from .panoptic_quality import contiguous_to_dataset_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PanopticImage:
    """The annotation of one image: its segments, and a PNG that is read when asked for. It can be pickled.

    segments: id, category_id (the file's) and iscrowd (0 or 1) of each.
    """

    path: Path
    segments: list[dict]

    def id_map(self) -> np.ndarray:
        """[H, W] int32 segment ids, 0 for void. Raises DataError where PNG and JSON disagree."""
        listed = [s["id"] for s in self.segments]
        ids = read_ids(self.path, listed)
        index_map(ids, listed, self.path)
        return ids


class PanopticGroundTruth:
    """Annotation by image id, in the category ids of the dataset's own files.

    Reads `panoptic_json` of the dataset's metadata at once, a PNG of `panoptic_root` when it is asked for. Raises
    ValueError where the metadata lack something, the file is missing or wrong, or it has other categories.
    """

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.metadata = MetadataCatalog.get(dataset_name)
        for key in ("panoptic_json", "panoptic_root"):
            if not hasattr(self.metadata, key):
                raise ValueError(f"dataset {dataset_name!r} has no {key} in its metadata: is it a panoptic dataset?")
        content = read_registered(self.metadata)
        self.categories = [c.as_dict() for c in content.categories]
        registered = registered_categories(self.metadata)
        check_same_categories(registered, self.categories, f"dataset {self.name!r}", self.metadata.panoptic_json)
        self.dataset_id = contiguous_to_dataset_id(self.metadata)
        self.class_names = [c["name"] for c in registered]
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

    def class_map(self, x: Mapping) -> np.ndarray:
        """[H, W] contiguous classes of an input: its `sem_seg_file_name`, or else those of its panoptic annotation."""
        if "sem_seg_file_name" in x:
            return read_classes(x["sem_seg_file_name"]).astype(np.int64)
        contiguous_id = {dataset: contiguous for contiguous, dataset in self.dataset_id.items()}
        ignore = getattr(self.metadata, "ignore_label", 255)
        return semantic_map(self.id_map(x["image_id"]), self.segments(x["image_id"]), contiguous_id, ignore)

    def warn_if_partial(self, evaluated: int) -> None:
        """Metrics cover the images seen; say so where those are not all."""
        if evaluated < len(self):
            logger.warning("%d of the %d annotated images of %s were evaluated", evaluated, len(self), self.name)


class SemanticGroundTruth:
    """The classes of a dataset that has class maps alone: ADE20K, or Cityscapes' semantic split."""

    def __init__(self, dataset_name: str):
        self.name = dataset_name
        self.class_names = list(MetadataCatalog.get(dataset_name).stuff_classes)

    def class_map(self, x: Mapping) -> np.ndarray:
        """[H, W] contiguous classes of an input."""
        return read_classes(x["sem_seg_file_name"]).astype(np.int64)


def semantic_map(id_map: np.ndarray, segments: list[dict], contiguous_id: dict[int, int], ignore: int) -> np.ndarray:
    """[H, W] int64 contiguous classes of a panoptic map; `ignore` for void and for categories outside the mapping.

    A crowd has its category's class, as in the semantic annotation of COCO and Cityscapes, which knows no crowds.
    """
    ids, inverse = np.unique(id_map, return_inverse=True)
    class_of = {s["id"]: contiguous_id.get(s["category_id"], ignore) for s in segments}
    return np.array([class_of.get(int(i), ignore) for i in ids], dtype=np.int64)[inverse].reshape(id_map.shape)
