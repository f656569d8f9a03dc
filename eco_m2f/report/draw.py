"""Panoptic maps and boxes as pictures."""

from collections.abc import Mapping, Sequence

import numpy as np


def draw_panoptic(
    image: np.ndarray,
    id_map: np.ndarray,
    segments: Sequence[dict],
    colors: Mapping[int, Sequence],
    opacity: float = 0.6,
) -> np.ndarray:
    """The image [H, W, 3] uint8 under its segments: a shade of the class's colour each, with dark outlines.

    id_map: int [H, W], 0 is void and stays uncovered. segments: dicts with `id` and `category_id`. colors: RGB, 0 to
    255, by category_id. Segments of one class differ in brightness. Raises ValueError for sizes that differ.
    """
    image, id_map = np.asarray(image), np.asarray(id_map)
    if image.shape[:2] != id_map.shape:
        raise ValueError(f"image and map differ in size: {image.shape[:2]}, {id_map.shape}")
    drawn = image.astype(float)
    for i, segment in enumerate(segments):
        shade = 1.0 - 0.3 * (i % 4) / 3
        where = id_map == segment["id"]
        drawn[where] += opacity * (shade * np.asarray(colors[segment["category_id"]], float) - drawn[where])
    drawn[_outlines(id_map)] *= 0.3
    return np.clip(drawn + 0.5, 0, 255).astype(np.uint8)


def draw_boxes(image: np.ndarray, objects: Sequence[Mapping], colors: Mapping[int, Sequence]) -> np.ndarray:
    """The image [H, W, 3] uint8 with the outlines of objects, one pixel wide, in the colours of their classes.

    objects: dicts with `bbox` (x, y, width, height in pixels) and `category_id`. colors: RGB, 0 to 255, by category_id.
    """
    drawn = np.array(image)
    height, width = drawn.shape[:2]
    for thing in objects:
        x, y, w, h = thing["bbox"]
        left, right = (int(np.clip(round(v), 0, width - 1)) for v in (x, x + w - 1))
        top, bottom = (int(np.clip(round(v), 0, height - 1)) for v in (y, y + h - 1))
        color = np.asarray(colors[thing["category_id"]])
        drawn[[top, bottom], left : right + 1] = color
        drawn[top : bottom + 1, [left, right]] = color
    return drawn


def _outlines(id_map: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another segment."""
    edge = np.zeros(id_map.shape, bool)
    edge[:, :-1] |= id_map[:, 1:] != id_map[:, :-1]
    edge[:-1] |= id_map[1:] != id_map[:-1]
    return edge
