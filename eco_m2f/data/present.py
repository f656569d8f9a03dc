"""Checks that the files of a dataset exist, before a run starts."""

import contextlib
import os
from collections.abc import Iterator

from detectron2.data import MetadataCatalog

from .categories import SEMANTIC_TYPES
from .datasets.paths import ROOT, datasets_root
from .images import DataError

PANOPTIC = ("panoptic_json", "image_root", "panoptic_root")  # what the metadata call them
BOXES = ("json_file", "image_root")
SEMANTIC = ("image_root", "image_dir", "sem_seg_root", "gt_dir")


def check_present(*names: str) -> None:
    """Raises DataError naming the first file or folder of the registered datasets that does not exist."""
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        keys = PANOPTIC if getattr(metadata, "panoptic_json", None) else BOXES
        if getattr(metadata, "evaluator_type", None) in SEMANTIC_TYPES:
            keys = SEMANTIC
        for path in (getattr(metadata, key, None) for key in keys):
            if path and not os.path.exists(path):
                raise DataError(
                    f"dataset {name!r} is not complete: {os.path.abspath(path)} does not exist; {_layout()}"
                )


@contextlib.contextmanager
def loading(names: str) -> Iterator[None]:
    """Turns an assertion of detectron2's loaders about missing files into a DataError."""
    try:
        yield
    except AssertionError as error:
        reason = " ".join(str(error).split()) or "its files are not as they should be"
        raise DataError(f"dataset {names!r} cannot be loaded: {reason}; {_layout()}") from error


def _layout() -> str:
    return (
        f"datasets/README.md shows the layout of each dataset below ${ROOT}, which is {datasets_root().absolute()} here"
    )
