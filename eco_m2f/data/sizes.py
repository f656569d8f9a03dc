"""Sizes of images before any of them is decoded: as their records or the panoptic JSON have them, else from headers."""

import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detectron2.data import MetadataCatalog
from PIL import Image

logger = logging.getLogger(__name__)

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the image by 90 degrees
TURNED = (5, 6, 7, 8)
READERS = 16  # threads; on a network drive a header is mostly waiting
_IMAGES = re.compile(r'"images"\s*:\s*(?=\[)')


def add_known_sizes(records: Sequence[dict], dataset_names: Sequence[str]) -> None:
    """Gives height and width (pixels) to the records that lack them, where the panoptic JSON of a dataset has them.

    detectron2's loaders of COCO panoptic and Cityscapes leave them out. The mapper compares them with the image.
    """
    if all("width" in r for r in records):
        return
    sizes = {}
    for name in dataset_names:
        metadata = MetadataCatalog.get(name)
        if hasattr(metadata, "panoptic_json") and hasattr(metadata, "panoptic_root"):
            folder = Path(metadata.panoptic_root)
            sizes |= {(folder, i): size for i, size in json_sizes(metadata.panoptic_json).items()}
    for record in records:
        folder = Path(record.get("pan_seg_file_name", "")).parent  # two datasets may have the same image ids
        size = sizes.get((folder, record.get("image_id")))
        if size and "width" not in record:
            record["height"], record["width"] = size


def json_sizes(panoptic_json: str | Path) -> dict[object, tuple[int, int]]:
    """{image id: (height, width)} of a JSON's `images`, those without whole numbers left out; empty if unreadable.

    The segments, which are nearly all of the file, are not parsed: COCO's 118,000 images take a second.
    """
    try:
        images = _read_images(Path(panoptic_json).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # headers tell as well; a JSON that is needed is refused by who needs it
    rows = [x for x in images if isinstance(x, dict) and isinstance(x.get("id"), (int, str))]
    sizes = {x["id"]: (x.get("height"), x.get("width")) for x in rows}
    return {i: size for i, size in sizes.items() if all(type(side) is int and side > 0 for side in size)}


def _read_images(text: str) -> list:
    found = list(_IMAGES.finditer(text))
    if len(found) != 1:  # the word is also a key of something else
        return json.loads(text)["images"]
    return json.JSONDecoder().raw_decode(text, found[0].end())[0]


def are_wide(records: Sequence[dict]) -> list[bool]:
    """Of each image whether it is wider than high, from its record, else from the header of its file.

    A file that cannot be read counts as high: who decodes it says what is wrong.
    """
    unknown = [r["file_name"] for r in records if "width" not in r]
    with ThreadPoolExecutor(READERS) as pool:
        headers = dict(zip(unknown, pool.map(header_size, unknown, chunksize=64)))
    if unknown:
        logger.info("Read the sizes of %d images from their headers, to group them by aspect ratio", len(unknown))
    sizes = [(r["height"], r["width"]) if "width" in r else headers[r["file_name"]] for r in records]
    return [width > height for height, width in sizes]


def header_size(file_name: str | Path) -> tuple[int, int]:
    """(height, width) of an image as it is shown, turned as its EXIF says; (0, 0) if the header cannot be read."""
    try:
        with Image.open(file_name) as image:
            width, height = image.size
            turned = "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0
    return (width, height) if turned else (height, width)
