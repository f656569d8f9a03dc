"""The names this project adds to detectron2's own: toy, nuclei, and COCO panoptic with semantic class maps.

detectron2 already registers coco_2017_{train,val}, coco_2017_{train,val}_panoptic and
cityscapes_fine_panoptic_{train,val}.
All paths lie under $DETECTRON2_DATASETS (./datasets if unset). It is read when this package is imported, as in
detectron2.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..toy import CATEGORIES as TOY_CATEGORIES
from .coco_boxes import load_coco_boxes, register_coco_boxes
from .coco_panoptic_like import load_coco_panoptic_like, register_coco_panoptic_like
from .paths import datasets_root

NUCLEI_CATEGORIES = [
    {"id": 1, "name": "nucleus", "isthing": 1, "color": [220, 80, 60]},
    {"id": 2, "name": "background", "isthing": 0, "color": [60, 70, 110]},
]


def register_all(root: Path | None = None) -> None:
    """Registers every name, with its files below `root`. They may be missing."""
    root = root or datasets_root()
    for split in ("train", "val"):
        _register_split("toy", split, root, TOY_CATEGORIES)
        _register_toy_boxes(split, root / "toy")
        _register_coco_with_sem_seg(split, root / "coco")
    for split in ("train", "val", "test"):
        _register_split("nuclei", split, root, NUCLEI_CATEGORIES)
    read_official_names()


def read_official_names() -> None:
    """Makes this project's reader load the names that detectron2 registers. Their metadata stay the same.

    detectron2's readers do not check the JSON. The records are the same, with the sizes from the JSON added.
    """
    for split in ("train", "val"):
        for name in (f"coco_2017_{split}_panoptic", f"cityscapes_fine_panoptic_{split}"):
            _replace(name, partial(load_coco_panoptic_like, MetadataCatalog.get(name).as_dict()))
        name = f"coco_2017_{split}"
        _replace(name, partial(load_coco_boxes, MetadataCatalog.get(name).as_dict()))


def _replace(name: str, load: Callable[[], list[dict]]) -> None:
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, load)


def _register_split(dataset: str, split: str, root: Path, categories: list[dict]) -> None:
    base = root / dataset
    register_coco_panoptic_like(
        f"{dataset}_panoptic_{split}",
        base / split,
        base / f"panoptic_{split}",
        base / "annotations" / f"panoptic_{split}.json",
        categories=categories,
    )


def _register_toy_boxes(split: str, base: Path) -> None:
    """The toy set's things as boxes."""
    things = [c for c in TOY_CATEGORIES if c["isthing"]]
    json_file = base / "annotations" / f"detection_{split}.json"
    register_coco_boxes(f"toy_detection_{split}", base / split, json_file, categories=things)


def _register_coco_with_sem_seg(split: str, base: Path) -> None:
    """COCO panoptic with class-map PNGs, for mIoU. datasets/prepare_coco_semantic.py makes them."""
    register_coco_panoptic_like(
        f"coco_2017_{split}_panoptic_with_sem_seg",
        base / f"{split}2017",
        base / f"panoptic_{split}2017",
        base / "annotations" / f"panoptic_{split}2017.json",
        categories=_coco_categories(),
        sem_seg_root=base / f"panoptic_semseg_{split}2017",
        instances_json=base / "annotations" / f"instances_{split}2017.json",
        evaluator_type="coco_panoptic_seg",
    )


def _coco_categories() -> list[dict]:
    """COCO's 133 categories in contiguous order, from detectron2's table."""
    meta = MetadataCatalog.get("coco_2017_val_panoptic")
    things = {i: c for c, i in meta.thing_dataset_id_to_contiguous_id.items()}
    ids = things | {i: c for c, i in meta.stuff_dataset_id_to_contiguous_id.items()}
    return [
        {"id": ids[i], "name": name, "isthing": int(i in things), "color": color}
        for i, (name, color) in enumerate(zip(meta.thing_classes, meta.thing_colors, strict=True))
    ]
