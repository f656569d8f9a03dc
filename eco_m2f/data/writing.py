"""Writes datasets in COCO panoptic format, each folder whole or not at all."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ..files import atomic_write
from .panoptic_map import VOID, ids_to_rgb


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder. If no error occurs, it replaces `output`; otherwise it is removed."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.parent / f".{output.name}.{os.getpid()}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if output.exists():
            shutil.rmtree(output)
        os.replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def already_made(output: str | Path, made_from: dict, splits: Collection[str], overwrite: bool) -> bool:
    """Whether `output` holds the dataset that `made_from` (JSON values) describes.

    Raises FileExistsError if it holds other files, or another dataset written here and `overwrite` is not set.
    """
    output = Path(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    present = [_made_from(output / "annotations" / f"panoptic_{split}.json") for split in splits]
    if all(p == made_from for p in present):
        return True
    if any(p is None for p in present):
        raise FileExistsError(f"{output} holds other files: choose another folder")
    if not overwrite:
        raise FileExistsError(
            f"{output} holds a dataset made from {present[0]}, not {made_from}: "
            "replace it with --overwrite, or choose another folder"
        )
    return False


def write_panoptic(path: str | Path, ids: np.ndarray) -> None:
    """Writes segment ids [H, W] as a panoptic PNG."""
    Image.fromarray(ids_to_rgb(ids)).save(path, compress_level=1)  # for flat areas much faster and barely larger


def describe_segments(ids: np.ndarray, category_of: Mapping[int, int], crowds: Collection[int] = ()) -> list[dict]:
    """segments_info (id, category_id, iscrowd, area, bbox x y w h) of each id in the map but void, ascending."""
    values, ranks, areas = np.unique(ids, return_inverse=True, return_counts=True)
    boxes = ndimage.find_objects(ranks.reshape(ids.shape) + 1)
    return [
        {
            "id": segment,
            "category_id": category_of[segment],
            "iscrowd": int(segment in crowds),
            "area": int(area),
            "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        }
        for segment, area, (rows, columns) in zip(values.tolist(), areas, boxes, strict=True)
        if segment != VOID
    ]


def write_json(
    path: str | Path, made_from: dict, images: list[dict], annotations: list[dict], categories: list[dict]
) -> None:
    """Writes a panoptic or detection JSON. Its info holds `made_from`, where a second run finds it."""
    content = {
        "info": {"made_from": made_from},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content))


def _made_from(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())["info"]["made_from"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, not JSON, or not written here
        return None
