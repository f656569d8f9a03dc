"""A generated Cityscapes validation set with every special case of its AP, and predictions for it."""

from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

THINGS = {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # label: contiguous class
SIZE = (96, 144)
OFFICIAL = "cityscapes_fine_panoptic_val"


def draw(rng: np.random.Generator) -> np.ndarray:
    """Ids of an image: stuff, void, groups, large and small objects, caravans with and without a number."""
    ids = np.full(SIZE, 7, dtype=np.uint16)
    ids[:24], ids[24:30], ids[90:] = 23, 4, 1
    for label in rng.choice([24, 26, 33], 2, replace=False):
        y, x = rng.integers(30, 70), rng.integers(0, 110)
        ids[y : y + 16, x : x + 30] = label  # a group
    ids[60:64, :40], ids[64:74, :20] = 29, 29001
    numbers = dict.fromkeys(THINGS, 0)
    for _ in range(rng.integers(6, 12)):
        label = int(rng.choice([24, 24, 24, 26, 26, 25, 32, 33]))
        side = int(rng.choice([6, 9, 10, 14, 20]))  # 36 and 81 pixels: too small to count; 100: just enough
        y, x = rng.integers(20, SIZE[0] - side), rng.integers(0, SIZE[1] - side)
        ids[y : y + side, x : x + side] = label * 1000 + numbers[label]
        numbers[label] += 1
    return ids


def predict(ids: np.ndarray, rng: np.random.Generator) -> Instances:
    """The image's objects moved a little, at times twice or as another class; groups, void, and false objects."""
    masks, classes, scores = [], [], []

    def add(mask, label):
        masks.append(mask), classes.append(THINGS[label])
        scores.append(round(float(rng.random()), 1))  # ties

    for i in np.unique(ids).tolist():
        label = i // 1000 if i >= 1000 else i
        if label not in THINGS or (i < 1000 and rng.random() < 0.4):
            continue
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            moved = np.roll(ids == i, rng.integers(-3, 4, 2), (0, 1))
            add(moved, label if rng.random() < 0.85 else int(rng.choice(list(THINGS))))
    for _ in range(4):
        mask = np.zeros(SIZE, dtype=bool)
        y, x = rng.integers(0, 80), rng.integers(0, 120)
        mask[y : y + 12, x : x + 20] = True
        add(mask, int(rng.choice(list(THINGS))))
    masks.append(np.zeros(SIZE, dtype=bool)), classes.append(11), scores.append(0.5)  # nothing at all
    found = Instances(SIZE)
    found.pred_masks = torch.from_numpy(np.array(masks)).float()
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return found


def write(root: Path, seed: int, num_images: int = 5) -> tuple[list[dict], list[dict]]:
    """Writes gtFine below `root`. Returns the inputs and outputs of a model."""
    rng = np.random.default_rng(seed)
    inputs, outputs = [], []
    for n in range(num_images):
        image_id, city = f"munster_{n:06d}_000019", root / "gtFine" / "val" / "munster"
        city.mkdir(parents=True, exist_ok=True)
        ids = draw(rng)
        Image.fromarray(ids).save(city / f"{image_id}_gtFine_instanceIds.png")
        name = f"leftImg8bit/val/munster/{image_id}_leftImg8bit.png"
        inputs.append({"image_id": image_id, "file_name": str(root / name)})
        outputs.append({"instances": predict(ids, rng)})
    return inputs, outputs


def register(name: str, root: Path, **more) -> None:
    """Cityscapes' metadata with the paths of `root`."""
    official = MetadataCatalog.get(OFFICIAL).as_dict()
    paths = {"gt_dir": str(root / "gtFine" / "val"), **more}
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(**{k: v for k, v in {**official, **paths}.items() if k != "name"})
