"""Small panoptic datasets, written again for each test."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from eco_m2f.config import add_eco_config
from eco_m2f.data.panoptic_map import ids_to_rgb

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = [  # ids with gaps and out of order: contiguous ids must follow the list
    {"id": 7, "name": "car", "isthing": 1, "color": [255, 0, 0]},
    {"id": 3, "name": "sky", "isthing": 0, "color": [0, 0, 255]},
    {"id": 90, "name": "dog", "isthing": 1},
]
BOXES = [[10.0, 4.0, 20.0, 8.0], [30.0, 20.0, 10.0, 15.0], [0.0, 0.0, 60.0, 40.0]]


@dataclass
class Tree:
    """A dataset on disk, and its JSON content. Tests change it before `save`."""

    base: Path
    content: dict = field(default_factory=lambda: {"images": [], "annotations": [], "categories": CATEGORIES})

    @property
    def json(self) -> Path:
        return self.base / "pan.json"

    def image(self, i: int) -> Path:
        return self.base / "images" / f"{i}.png"

    def panoptic(self, i: int) -> Path:
        return self.base / "panoptic" / f"{i}.png"

    def add(self, i: int, ids: np.ndarray, categories: dict[int, int], crowds: tuple = ()) -> None:
        """Writes an image whose colour is its segment's id, the panoptic PNG, and both JSON entries."""
        for folder in ("images", "panoptic"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids_to_rgb(ids)).save(self.image(i))
        Image.fromarray(ids_to_rgb(ids)).save(self.panoptic(i))
        height, width = ids.shape
        self.content["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        segments = [
            {"id": s, "category_id": c, "iscrowd": int(s in crowds), "area": int((ids == s).sum())}
            for s, c in categories.items()
        ]
        self.content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})

    @staticmethod
    def blocks(height: int = 40, width: int = 60) -> np.ndarray:
        """Segments 300 (upper left), 70000 (upper right), 9 (below) and a strip of void at the bottom."""
        ids = np.full((height, width), 9, dtype=np.int32)
        ids[: height // 2, : width // 3] = 300
        ids[: height // 2, width // 3 :] = 70000
        ids[-4:] = 0
        return ids

    def save(self) -> "Tree":
        self.json.write_text(json.dumps(self.content))
        return self

    @property
    def spec(self) -> str:
        return f"images={self.base / 'images'},panoptic={self.base / 'panoptic'},json={self.json}"


@pytest.fixture
def tree(tmp_path) -> Tree:
    """Two good images: cars 300 and 70000 (a crowd in image 2), sky 9."""
    made = Tree(tmp_path / "own")
    made.add(1, made.blocks(), {300: 7, 70000: 90, 9: 3})
    made.add(2, made.blocks(50, 30), {300: 7, 70000: 7, 9: 3}, crowds=(70000,))
    return made.save()


@pytest.fixture
def own(tmp_path, forget):
    """A dataset of one image, 60 x 40. Its pixels are 200 in the first box and 0 elsewhere. The last box is a crowd."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[4:12, 10:30] = 200
    Image.fromarray(image).save(tmp_path / "1.png")
    objects = [
        {"id": i, "image_id": 1, "category_id": c, "bbox": list(b), "area": b[2] * b[3], "iscrowd": int(i == 3)}
        for i, (b, c) in enumerate(zip(BOXES, (9, 4, 4)), start=1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}],
        "annotations": objects,
        "categories": [{"id": 9, "name": "nine"}, {"id": 4, "name": "four", "color": [1, 2, 3]}],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path, content


@pytest.fixture
def forget():
    """Removes from detectron2's catalogs whatever the test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def cfg() -> CfgNode:
    """The project's config without geometric augmentation: the mappers do not change an image."""
    cfg = get_cfg()
    add_eco_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40,), 4096
    return cfg


@pytest.fixture(scope="session")
def script():
    """Imports a script by its path in the checkout, without the suffix."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # worker processes find their function by this name
        spec.loader.exec_module(module)
        return module

    return load
