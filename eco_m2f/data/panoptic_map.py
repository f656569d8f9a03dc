"""Reads panoptic and semantic PNGs, and turns segment ids into masks quickly.

A panoptic PNG in COCO's format stores the segment id at each pixel, as R + 256 G + 65536 B. Id 0 is void. A semantic
PNG (class map) stores the contiguous class in one channel.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .images import ADVICE, DataError, Opened, open_image

VOID = 0  # segment id of an unlabelled pixel in the PNG

RENUMBER = "a real segment needs another id, from 1 on: renumber it in the JSON and in the pixels of the PNG"
NOT_ITS_IDS = (
    "the PNG belongs to another image, or its pixels do not store ids as R + 256 G + 65536 B. Do not delete anything; "
    "write the PNG again, as panopticapi.utils.id2rgb does"
)


def read_ids(file_name: str | Path, segment_ids: Iterable[int] | None = None) -> np.ndarray:
    """Reads a panoptic PNG into segment ids, int32 [H, W].

    segment_ids: those that the JSON lists. A PNG with a palette is read only if its colours are among them, because it
    could also mean the indices. Raises DataError if the file is missing, unreadable or stored in another way.
    """
    png = _open_labels(file_name, "panoptic PNG")
    mode = png.image.mode
    if mode not in ("RGB", "RGBA", "P") or png.sixteen_bits:
        raise DataError(
            f"{file_name}: a panoptic PNG must be RGB of 8 bits (segment id = R + 256 G + 65536 B), got mode {mode} "
            f"({png.raw}). Write it with eco_m2f.data.panoptic_map.ids_to_rgb, and {ADVICE}"
        )
    ids = _to_ids(png.image)
    if mode == "P":
        _check_palette(ids, np.asarray(png.image), segment_ids, file_name)
    return ids


def _to_ids(image: Image.Image) -> np.ndarray:
    rgb = np.asarray(image.convert("RGBA") if image.mode == "P" else image)  # Pillow warns of a palette as RGB
    return rgb[..., 0] + rgb[..., 1] * np.int32(256) + rgb[..., 2] * np.int32(65536)


def _check_palette(
    ids: np.ndarray, indices: np.ndarray, segment_ids: Iterable[int] | None, file_name: str | Path
) -> None:
    """Raises DataError unless the colours of a palette PNG are segment ids that the JSON lists."""
    listed = {VOID, *(segment_ids or ())}
    drawn = np.unique(ids).tolist()
    if segment_ids is not None and listed.issuperset(drawn):
        return
    fit = "its indices are ids that the JSON lists"
    if not listed.issuperset(np.unique(indices).tolist()):
        fit = "neither its colours nor its indices are the ids that the JSON lists"
    raise DataError(
        f"{file_name}: a panoptic PNG must be RGB (segment id = R + 256 G + 65536 B), this one has a palette; {fit}. "
        "If the indices are meant, write it again: Image.fromarray(ids_to_rgb(np.asarray(Image.open(png), 'int32'))) "
        "with ids_to_rgb of eco_m2f.data.panoptic_map. Do not change the JSON"
    )


def read_classes(file_name: str | Path) -> np.ndarray:
    """Reads a semantic PNG into classes, uint8 [H, W]. Raises DataError if it is missing, unreadable or in colour."""
    png = _open_labels(file_name, "semantic PNG")
    # Pillow stretches grey values of 2 and 4 bits to 0..255, but not the indices of a palette.
    if png.image.mode not in ("L", "P") or png.raw in ("L;2", "L;4"):
        raise DataError(
            f"{file_name}: a semantic PNG must hold one channel of 8 bits, the class, got mode {png.image.mode} "
            f"({png.raw}); datasets/README.md shows how to make it"
        )
    classes = np.asarray(png.image)
    if png.image.mode == "P":
        _check_grey_palette(classes, png.image, file_name)
    return classes


def _check_grey_palette(indices: np.ndarray, image: Image.Image, file_name: str | Path) -> None:
    """Raises DataError if the palette's greys differ from the indices. Tools that shrink PNGs write such files."""
    used = np.unique(indices)
    colors = np.zeros((256, 3), dtype=np.uint8)
    palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    colors[: len(palette)] = palette
    greys = colors[used]
    if (greys == greys[:, :1]).all() and (greys[:, 0] != used).any():
        raise DataError(
            f"{file_name}: a semantic PNG with a palette of greys, {greys[:, 0].tolist()[:5]} for the indices "
            f"{used.tolist()[:5]}: either may be the classes. Save it as 8-bit grey whose values are the classes"
        )


def _open_labels(file_name: str | Path, kind: str) -> Opened:
    """Opens a PNG of labels. Raises DataError for an EXIF orientation, because labels may not be meant to turn."""
    png = open_image(file_name, kind, ("PNG",))
    if png.orientation != 1:
        raise DataError(
            f"{file_name}: {kind} has the EXIF orientation {png.orientation}; save it without, aligned with the image "
            "as viewers show it"
        )
    return png


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Segment ids [H, W] -> pixels of a panoptic PNG, uint8 [H, W, 3]."""
    if ids.min() < 0 or ids.max() >= 1 << 24:
        raise ValueError(f"segment ids must lie in 0..{(1 << 24) - 1}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)


def index_map(ids: np.ndarray, segment_ids: list[int], source: str | Path = "panoptic map") -> np.ndarray:
    """Replaces segment ids by positions in `segment_ids`.

    Returns uint8 planes: [H, W] for fewer than 255 segments, else [H, W, 3] with the low byte first. They survive any
    nearest-neighbour transform, and the padding value 255 means void. `decode` undoes it.
    Raises DataError if an id of the map is not in the list, or the reverse. `source` names the file in the message.
    """
    values, lengths = _runs(ids)
    known = np.asarray([VOID, *segment_ids], dtype=np.int64)
    order = np.argsort(known)
    place = np.searchsorted(known[order], values).clip(max=len(known) - 1)
    position = order[place] - 1  # -1: void
    _raise_unless_equal(values, known[order][place], segment_ids, position, source)
    index = np.repeat(position, lengths).reshape(ids.shape)
    if len(segment_ids) < 255:
        return np.where(index < 0, 255, index).astype(np.uint8)
    return ids_to_rgb(np.where(index < 0, (1 << 24) - 1, index))


def decode(planes: np.ndarray) -> np.ndarray:
    """Planes of `index_map` -> positions [H, W], uint8 (void 255) or int32 (void 2**24 - 1)."""
    if planes.ndim == 2:
        return planes
    wide = planes.astype(np.int32)
    return wide[..., 0] + wide[..., 1] * 256 + wide[..., 2] * 65536


def masks_of(planes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The masks of the `wanted` positions that still have a pixel: (positions [N], bool [N, H, W])."""
    positions = decode(planes)
    # The void value may be far above the number of segments: fold it into one slot before counting.
    count = int(wanted.max(initial=-1)) + 1
    pixels = np.bincount(np.minimum(positions, count).ravel(), minlength=count + 1)
    left = wanted[pixels[wanted] > 0]
    return left, positions[None] == left.astype(positions.dtype)[:, None, None]


def _runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of the runs of equal pixels, row-major. There are far fewer runs than pixels."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return flat[starts], np.diff(starts, append=flat.size)


def _raise_unless_equal(
    values: np.ndarray, matched: np.ndarray, segment_ids: list[int], position: np.ndarray, source: str | Path
) -> None:
    """Raises DataError unless the ids of the map are those of the list.

    position: of each value in `segment_ids`; matched: the id there. No message advises to delete annotation blindly.
    """
    if VOID in segment_ids:
        raise DataError(f"{source}: segments_info lists the id 0, which is void; {RENUMBER}, and {ADVICE}")
    stray = np.unique(values[values != matched])
    absent = np.setdiff1d(np.arange(len(segment_ids)), position[values == matched])
    if stray.size and absent.size and len(absent) == len(segment_ids):
        raise DataError(
            f"{source}: none of the ids in segments_info ({_few(np.asarray(segment_ids))}) is in the PNG, which holds "
            f"{_few(stray)}: {NOT_ITS_IDS}, and {ADVICE}"
        )
    if stray.size:
        raise DataError(
            f"{source}: the PNG holds segment id(s) {_few(stray)} that its segments_info does not list; "
            f"list them there with their categories, and {ADVICE}"
        )
    if absent.size:
        raise DataError(
            f"{source}: segments_info lists id(s) {_few(np.asarray(segment_ids)[absent])} that own no pixel of the "
            f"PNG; compare the PNG with its source, delete from the JSON what is not visible there, and {ADVICE}"
        )


def _few(ids: np.ndarray) -> str:
    """At most five ids, for a message."""
    return ", ".join(str(i) for i in ids[:5]) + (f", ... ({len(ids)} in all)" if len(ids) > 5 else "")
