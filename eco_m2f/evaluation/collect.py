"""Bringing per-image rows together from all processes, and writing results whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from detectron2.utils import comm

from ..files import atomic_write


def gather_rows(rows: Mapping) -> dict | None:
    """Rows of all processes by image id, in the order of the ids; None on every process but the first.

    Sums over the result are the same, to the last bit, whatever the number of processes. An image that a sampler gave
    to two processes is there once.
    """
    gathered = comm.gather(dict(rows), dst=0)
    if not comm.is_main_process():
        return None
    merged = {image_id: row for part in gathered for image_id, row in part.items()}
    return {image_id: merged[image_id] for image_id in sorted(merged)}


def write_json(folder: str | os.PathLike | None, name: str, content) -> None:
    """Write `folder/name`, replacing it in one step; nothing is written without a folder."""
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / name, "w") as file:
        json.dump(content, file, indent=1)
