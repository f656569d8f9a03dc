"""The things of an image as COCO's instances, from an instance JSON or from the panoptic annotation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from ..data.annotations import read
from ..data.categories import check_same_categories
from ..data.masks import run_lengths
from ..data.panoptic_map import DataError
from ..data.schema import INSTANCES
from .average_precision import encode
from .ground_truth import PanopticGroundTruth, PanopticImage


class InstanceGroundTruth:
    """The objects of each image: those of the metadata's `json_file` (COCO instances) if it has one, else the things
    of the panoptic annotation."""

    def __init__(self, panoptic: PanopticGroundTruth):
        self.panoptic = panoptic
        self.things = [c for c in panoptic.categories if c["isthing"]]
        ids = {c["id"] for c in self.things}
        self.thing_classes = [contiguous for contiguous, dataset in panoptic.dataset_id.items() if dataset in ids]
        json_file = getattr(panoptic.metadata, "json_file", None)
        self._given = GivenInstances(json_file, self.things) if json_file else None

    def image(self, image_id) -> "GivenImage | PanopticThings":
        """A reader of an image's objects: `objects(size)`. Can be pickled. Raises ValueError for an unknown image."""
        if self._given:
            return self._given.image(image_id)
        return PanopticThings(image_id, self.panoptic.image(image_id), frozenset(c["id"] for c in self.things))


@dataclass(frozen=True)
class PanopticThings:
    """The things of an image's panoptic annotation. The PNG is read on demand."""

    image_id: object
    image: PanopticImage
    things: frozenset[int]

    def objects(self, size: tuple[int, int]) -> list[dict]:
        """COCO's annotations. size is not used: the PNG has its own."""
        id_map = self.image.id_map()
        objects = []
        for segment in self.image.segments:
            if segment["category_id"] in self.things:
                code = encode((id_map == segment["id"]).astype(np.uint8))
                objects.append(_object(self.image_id, segment["category_id"], segment["iscrowd"], code))
        return objects


class GivenInstances:
    """The objects of an instance JSON. Raises ValueError if it is damaged, or its categories are not the things."""

    def __init__(self, json_file: str, things: Sequence[Mapping]):
        self._json_file = json_file
        content = read(json_file, INSTANCES)
        categories = [c.as_dict() for c in content.categories]
        check_same_categories(things, categories, "the things of the panoptic annotation", json_file)
        self._objects: dict = {image.id: [] for image in content.images}
        for annotation in content.annotations:
            self._objects[annotation.image_id].append(annotation)

    def image(self, image_id) -> "GivenImage":
        """Raises ValueError for an image that is not listed."""
        if image_id not in self._objects:
            raise ValueError(f"{self._json_file}: image {image_id!r} is not in `images`; add it, with its objects")
        return GivenImage(self._json_file, image_id, self._objects[image_id])


@dataclass(frozen=True)
class GivenImage:
    """The objects of one image of an instance JSON."""

    json_file: str
    image_id: object
    annotations: list

    def objects(self, size: tuple[int, int]) -> list[dict]:
        """COCO's annotations of the image. size: its (height, width).

        The area of an object is that of the JSON, unless the mask contradicts it. It only decides between small, medium
        and large.
        """
        objects = []
        for o in self.annotations:
            try:
                code = run_lengths(o.segmentation, size)
            except ValueError as error:
                raise DataError(f"{self.json_file}: an object of image {self.image_id!r} has {error}") from error
            made = _object(self.image_id, o.category_id, int(o.iscrowd or 0), code)
            believed = o.area is not None and made["area"] / 2 <= o.area <= made["area"] * 2
            objects.append({**made, "area": o.area if believed else made["area"]})
        return objects


def _object(image_id, category_id: int, iscrowd: int, code: dict) -> dict:
    shape = {"segmentation": code, "bbox": rle.toBbox(code).tolist(), "area": int(rle.area(code))}
    return {"image_id": image_id, "category_id": category_id, "iscrowd": iscrowd, **shape}
