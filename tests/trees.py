"""Generated COCO, Cityscapes, ADE20K, nuclei and toy trees in their official layouts: a few small images each.

`write_all(root)` makes the content of $DETECTRON2_DATASETS, with the project's own scripts if they are documented.
"""

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from minis import ROOT
from PIL import Image

from eco_m2f.data.panoptic_map import ids_to_rgb
from eco_m2f.data.toy import ToySpec, make_toy_dataset

COUNT = {"train": 4, "val": 2}  # images
SIZE = (48, 64)  # of COCO and ADE20K, height and width; every other image to train on stands upright
STREET = (64, 128)  # of Cityscapes
TOY_SIZE = 64
PERSON, CAR, SKY = 1, 3, 187  # COCO's category ids


def write_all(root: Path) -> None:
    """Writes every tree below `root`, for reading by the registered names."""
    coco, cityscapes, ade = root / "coco", root / "cityscapes", root / "ADEChallengeData2016"
    write_coco(coco)
    write_cityscapes(cityscapes)
    write_ade(ade)
    write_nuclei(root / "raw")
    for split in ("train", "val"):
        script("datasets/prepare_cityscapes_panoptic").prepare(cityscapes, split)
    for split in ("training", "validation"):
        script("datasets/prepare_ade20k_semantic").prepare(ade, split)
    panoptic = (coco / "annotations" / "panoptic_val2017.json", coco / "panoptic_val2017")
    script("datasets/prepare_coco_semantic").prepare(*panoptic, coco / "panoptic_semseg_val2017")
    script("datasets/prepare_nuclei").prepare(root / "raw", root / "nuclei")
    make_toy_dataset(root / "toy", ToySpec(COUNT["train"], COUNT["val"], TOY_SIZE))


def script(name: str):
    """Imports a script of the checkout by its path without suffix."""
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(split: str, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, ids and picture of each image: 300 and 77777 above 5000, and a strip of 0 at the bottom."""
    rng = np.random.default_rng(len(split))
    for i in range(COUNT[split]):
        ids = np.full(size[::-1] if split == "train" and i % 2 else size, 5000, dtype=np.int32)
        ids[10:30, 4 + i : 16], ids[8:24, 24 + i : 40], ids[-6:] = 300, 77777, 0
        colors = {300: (220, 60, 40), 77777: (40, 60, 220), 5000: (90, 160, 90), 0: (0, 0, 0)}
        picture = np.zeros((*ids.shape, 3), dtype=np.int64)
        for value, color in colors.items():
            picture[ids == value] = color
        noisy = picture + rng.integers(0, 20, picture.shape)
        yield 1000 * len(split) + i, ids, noisy.clip(0, 255).astype(np.uint8)


def write_coco(base: Path) -> None:
    """JPEGs with a person, a crowd of persons (image 0: a car), sky and void each."""
    (base / "annotations").mkdir(parents=True)
    for split in COUNT:
        folders = [base / f"{split}2017", base / f"panoptic_{split}2017"]
        panoptic = {"images": [], "annotations": [], "categories": _coco_categories("coco_2017_val_panoptic")}
        boxes = {"images": [], "annotations": [], "categories": _coco_categories("coco_2017_val")}
        for folder in folders:
            folder.mkdir()
        for number, ids, picture in images(split, SIZE):
            stem = f"{number:012d}"
            Image.fromarray(picture).save(folders[0] / f"{stem}.jpg")
            Image.fromarray(ids_to_rgb(ids)).save(folders[1] / f"{stem}.png")
            entry = {"id": number, "file_name": f"{stem}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
            second = (77777, PERSON, 1) if panoptic["images"] else (77777, CAR, 0)
            segments = [_segment(ids, *s) for s in ((300, PERSON, 0), second, (5000, SKY, 0))]
            panoptic["images"].append(entry), boxes["images"].append(entry)
            panoptic["annotations"].append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
            for s in segments[:2]:
                boxes["annotations"].append(_instance(s, number, len(boxes["annotations"]) + 1, ids.shape))
        for name, content in (("panoptic", panoptic), ("instances", boxes)):
            (base / "annotations" / f"{name}_{split}2017.json").write_text(json.dumps(content))


def _coco_categories(name: str) -> list[dict]:
    meta = MetadataCatalog.get(name)
    things = meta.thing_dataset_id_to_contiguous_id
    ids_of = {i: c for table in (things, meta.get("stuff_dataset_id_to_contiguous_id", {})) for c, i in table.items()}
    return [{"id": ids_of[i], "name": n, "isthing": int(ids_of[i] in things)} for i, n in enumerate(meta.thing_classes)]


def _segment(ids: np.ndarray, i: int, category: int, crowd: int) -> dict:
    y, x = np.nonzero(ids == i)
    box = [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]
    return {"id": i, "category_id": category, "iscrowd": crowd, "area": len(y), "bbox": box}


def _instance(segment: dict, image_id: int, i: int, shape: tuple[int, int]) -> dict:
    """The same as COCO's instance annotation: polygons, and run lengths for crowds."""
    x, y, w, h = segment["bbox"]
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if segment["iscrowd"]:
        mask = np.zeros(shape, dtype=np.uint8)
        mask[y : y + h, x : x + w] = 1
        edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=0))
        outline = {"size": list(shape), "counts": np.diff(edges, prepend=0, append=mask.size).tolist()}
    kept = {k: segment[k] for k in ("category_id", "iscrowd", "area", "bbox")}
    return {"id": i, "image_id": image_id, **kept, "segmentation": outline}


def write_cityscapes(base: Path) -> None:
    """The content of the two zip files: road, sky, a car, a group of persons, void."""
    for split, city in (("train", "aachen"), ("val", "munster")):
        folders = [base / kind / split / city for kind in ("gtFine", "leftImg8bit")]
        for folder in folders:
            folder.mkdir(parents=True)
        for i in range(COUNT[split]):
            ids = np.full(STREET, 7, dtype=np.uint16)
            ids[:10], ids[8:24, 10 + i : 30], ids[8:24, 60:80], ids[60:] = 23, 26001, 24, 1
            stem = f"{city}_{i:06d}_000019"
            Image.fromarray(ids).save(folders[0] / f"{stem}_gtFine_instanceIds.png")
            labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
            Image.fromarray(labels).save(folders[0] / f"{stem}_gtFine_labelIds.png")
            outline = {"imgHeight": STREET[0], "imgWidth": STREET[1], "objects": []}
            (folders[0] / f"{stem}_gtFine_polygons.json").write_text(json.dumps(outline))
            shades = np.stack([ids % 251, ids // 251, ids % 7 * 30], axis=-1).astype(np.uint8)
            Image.fromarray(shades).save(folders[1] / f"{stem}_leftImg8bit.png")


def write_ade(base: Path) -> None:
    for split, folder in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations"):
            (base / kind / folder).mkdir(parents=True)
        for number, ids, picture in images(split, SIZE):
            stem = f"ADE_{split}_{number:08d}"
            Image.fromarray(picture).save(base / "images" / folder / f"{stem}.jpg")
            labels = np.select([ids == 300, ids == 77777, ids == 5000], [13, 21, 3]).astype(np.uint8)
            Image.fromarray(labels).save(base / "annotations" / folder / f"{stem}.png")


def write_nuclei(raw: Path) -> None:
    for folder in ("images", "instance_ids"):
        (raw / folder).mkdir(parents=True)
    rows = [("image_id", "width", "height", "num_nuclei")]
    for name in "abcd":
        ids = np.zeros((30, 30), dtype=np.uint16)
        ids[3:9, 3:9], ids[9:20, 9:15] = 1, 2
        Image.fromarray(ids).save(raw / "instance_ids" / f"{name}.png")
        Image.new("RGB", (30, 30)).save(raw / "images" / f"{name}.png")
        rows.append((name, 30, 30, 2))
    with (raw / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
