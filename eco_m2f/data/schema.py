"""The fields of a dataset's JSON files: COCO's panoptic, detection and instance formats.

datasets/README.md has the same as a table. Other fields are not read. null in an optional field means that the field is
absent. Whole numbers may be written as 96.0. true and false mean 1 and 0. Numbers in quotes are refused, and so are
numbers as names.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta, Struct

from .panoptic_map import RENUMBER

Flag = Annotated[int, Meta(ge=0, le=1)] | bool
Side = Annotated[int, Meta(ge=1, le=1 << 20)]  # pixels
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
ImageId = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | Text
SegmentId = Annotated[int, Meta(ge=1, le=(1 << 24) - 1)]  # three bytes of a PNG; 0 is void
Byte = Annotated[int, Meta(ge=0, le=255)]
Place = Annotated[float, Meta(ge=-1e6, le=1e6)]  # pixels
Extent = Annotated[float, Meta(ge=0, le=1e6)]  # pixels
Box = tuple[Place, Place, Extent, Extent]  # left, top, width, height


class ListedImage(Struct, kw_only=True, gc=False):
    """An entry of `images` in the instance JSON of a panoptic dataset."""

    id: ImageId


class Image(ListedImage, kw_only=True, gc=False):
    """An entry of `images`. If height or width is absent, both are read from the file."""

    file_name: Text
    height: Side | None = None
    width: Side | None = None


class Category(Struct, kw_only=True, gc=False):
    id: Count
    name: Text
    isthing: Flag | None = None
    color: tuple[Byte, Byte, Byte] | None = None
    supercategory: Any = None  # read to recognise a category that only groups others

    def as_dict(self) -> dict:
        """id and name; isthing (0 or 1) and color ([R, G, B]) if they are given."""
        kind = {} if self.isthing is None else {"isthing": int(self.isthing)}
        return {"id": self.id, "name": self.name, **kind, **({} if self.color is None else {"color": list(self.color)})}


class PanopticCategory(Category, kw_only=True, gc=False):
    isthing: Flag


class Segment(Struct, kw_only=True, gc=False):
    """An entry of `segments_info`. The area is only compared with the mask."""

    id: SegmentId
    category_id: Count
    iscrowd: Flag | None = None
    area: float | None = None

    def as_dict(self) -> dict:
        """id, category_id and iscrowd (0 or 1)."""
        return {"id": self.id, "category_id": self.category_id, "iscrowd": int(self.iscrowd or 0)}


class PanopticAnnotation(Struct, kw_only=True, gc=False):
    image_id: ImageId
    file_name: Text  # of the PNG
    segments_info: list[Segment]


class AnyObject(Struct, kw_only=True, gc=False):
    """The fields of an object in both formats. Its id is not used; objects are numbered again where needed."""

    image_id: ImageId
    category_id: Count
    area: float | None = None
    iscrowd: Flag | None = None
    ignore: Flag | None = None  # 1 is refused
    id: int | str | None = None


class Object(AnyObject, kw_only=True, gc=False):
    """An object with its box."""

    bbox: Box

    def as_dict(self) -> dict:
        """category_id, bbox (x y w h, pixels), iscrowd (0 or 1), area (the box's if the file's is wrong)."""
        box = self.bbox[2] * self.bbox[3]
        area = self.area if self.area and 0 < self.area <= 1.01 * box + 1 else box
        kind = {"category_id": self.category_id, "iscrowd": int(self.iscrowd or 0)}
        return {**kind, "bbox": list(self.bbox), "area": area}


class Rle(Struct, kw_only=True):
    """Run lengths of a mask, column by column, as numbers or in pycocotools' text form."""

    size: tuple[Side, Side]  # height, width
    counts: str | list[Count]


class MaskedObject(AnyObject, kw_only=True, gc=False):
    """An object of an instance JSON, with its mask."""

    segmentation: list[list[Place]] | Rle


class Content(Struct, kw_only=True):
    """A whole file. Subclasses give the types of images and annotations."""

    images: list
    annotations: list
    categories: list[Category]


class PanopticContent(Content, kw_only=True):
    images: list[Image]
    annotations: list[PanopticAnnotation]
    categories: list[PanopticCategory]


class DetectionContent(Content, kw_only=True):
    images: list[Image]
    annotations: list[Object]


class InstanceContent(Content, kw_only=True):
    images: list[ListedImage]
    annotations: list[MaskedObject]


@dataclass(frozen=True)
class Kind:
    """A kind of JSON file: its name in messages, the schema of the file, and the schema of each list's entries."""

    name: str
    content: type[Content]
    annotation: type[Struct]
    category: type[Category] = Category
    image: type[Struct] = Image

    def entry(self, section: str) -> type[Struct]:
        return {"images": self.image, "annotations": self.annotation, "categories": self.category}[section]


PANOPTIC = Kind("panoptic", PanopticContent, PanopticAnnotation, PanopticCategory)
DETECTION = Kind("detection", DetectionContent, Object)
INSTANCES = Kind("instance", InstanceContent, MaskedObject, image=ListedImage)

REMEDIES = {  # by field: what to write
    "id of a segment": f"segment ids are whole numbers from 1 to 16777215, and 0 is void: {RENUMBER}",
    "id": "ids are whole numbers, not in quotes (those of images may all be texts)",
    "image_id": "write the id of an entry of `images`, as it is written there",
    "category_id": "write the id of an entry of `categories`, a whole number of 0 or more",
    "isthing": "write 1 for things and 0 for stuff, without quotes",
    "iscrowd": "write 0 or 1, without quotes, or leave it out for 0",
    "ignore": "leave such an object out; or write iscrowd 1: training and evaluation ignore crowds",
    "height": "write a whole number of pixels, without quotes; or leave height and width out to use the image's own",
    "width": "write a whole number of pixels, without quotes; or leave height and width out to use the image's own",
    "file_name": "write a text: the file's path below the folder of the images, or of the PNGs",
    "bbox": "write [x, y, width, height]: four numbers in pixels, the last two not negative",
    "area": "write a number of pixels, or leave it out",
    "color": "write [R, G, B], three whole numbers from 0 to 255, or leave it out",
    "name": "write the name of the category, a text",
    "segmentation": "write polygons [[x1, y1, x2, y2, x3, y3, ...], ...] of three points or more, or a run-length code",
    "size": "write [height, width] of the image",
    "counts": "write the run lengths as numbers, or as pycocotools' text",
    "segments_info": "write the list of the PNG's segments; [] if the image has none",
}
REMEDY = "datasets/README.md has a table of the fields"
