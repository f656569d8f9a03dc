"""Masks of an instance JSON as run-length codes. They are checked first, because pycocotools does not check them."""

from pycocotools import mask as rle

from .annotations import is_polygon
from .schema import Rle


def run_lengths(segmentation: list[list[float]] | Rle, size: tuple[int, int]) -> dict:
    """pycocotools' compressed code of polygons ([x1, y1, x2, y2, ...], pixels) or run lengths. size: (height, width).

    Polygons of fewer than three points are left out. Raises ValueError if none is left, or if the run lengths do not
    fit a mask of this size.
    """
    if isinstance(segmentation, list):
        polygons = [points for points in segmentation if is_polygon(points)]
        if not polygons:
            raise ValueError("no polygon of three points or more: correct it, or delete the object")
        return as_text(rle.merge(rle.frPyObjects(polygons, *size)))
    if tuple(segmentation.size) != size:
        raise ValueError(f"a mask of {segmentation.size} (height, width) in an image of {size}: correct one of them")
    counts = segmentation.counts
    counts = _counts_of(counts) if isinstance(counts, str) else counts
    if sum(counts) != size[0] * size[1] or min(counts, default=0) < 0:
        raise ValueError(
            f"run lengths of {sum(counts)} pixels in a mask of {size[0] * size[1]} pixels: write the mask again"
        )
    return as_text(rle.frPyObjects({"size": list(size), "counts": counts}, *size))


def _counts_of(text: str) -> list[int]:
    """The run lengths in pycocotools' text. Raises ValueError.

    A character has five bits of a number, the lowest first. From the fourth number on, each is the difference to the
    number two places before.
    """
    counts: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths that are no code of pycocotools ({text[:20]!r}): write the mask again")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number, shift = 0, 0
    if shift:
        raise ValueError("run lengths that break off: write the mask again")
    return counts


def as_text(code: dict) -> dict:
    """A code that can be written as JSON."""
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}
