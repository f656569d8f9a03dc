"""Sizes of images in files, after resizing for the test, and after padding. All are (height, width) in pixels."""

import csv
import os
from collections.abc import Mapping, Sequence

from detectron2.data.transforms import ResizeShortestEdge


def padded_size(size: Sequence[int], divisibility: int) -> tuple[int, int]:
    """(height, width) after padding to multiples of `divisibility`. Raises ValueError if `size` is not valid."""
    height, width = checked_size(size)
    step = max(1, divisibility)
    return -(-height // step) * step, -(-width // step) * step


def input_sizes(x: Mapping, divisibility: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padded size and the output size of a model's input that runs alone.

    Args:
        x: `image` [3, H, W]; `height` and `width` of the result, by default the image's.
        divisibility: the model pads to multiples of this.
    """
    height, width = x["image"].shape[-2:]
    return padded_size((height, width), divisibility), (x.get("height", height), x.get("width", width))


def at_test_size(size: Sequence[int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) of an image after INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST. MIN_SIZE_TEST 0 does not resize."""
    height, width = checked_size(size)
    return ResizeShortestEdge.get_output_shape(height, width, shortest, longest) if shortest else (height, width)


def read_image_sizes(path: str | os.PathLike) -> list[tuple[int, int]]:
    """The columns height and width of a CSV file, row by row.

    Raises:
        OSError: the file cannot be opened. ValueError: it is no CSV, lacks a column or has no rows, or a value is no
            size.
    """
    sizes = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            rows = csv.DictReader(file)
            missing = [name for name in ("height", "width") if name not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path} lacks the columns {missing}: its first line names {rows.fieldnames}")
            for row in rows:
                try:
                    sizes.append(checked_size((row["height"], row["width"])))
                except (TypeError, ValueError) as error:
                    found = f"height {row['height']!r}, width {row['width']!r}"
                    raise ValueError(f"{path}, line {rows.line_num}: {found} is not a size in pixels") from error
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV file: {error}") from error
    if not sizes:
        raise ValueError(f"{path} has no rows: there must be one per image")
    return sizes


def checked_size(size: Sequence[int]) -> tuple[int, int]:
    height, width = (int(n) for n in size)
    if height < 1 or width < 1:
        raise ValueError(f"a size is a height and a width of at least 1 pixel, got {height} x {width}")
    return height, width
