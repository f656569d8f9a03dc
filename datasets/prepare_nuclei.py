"""Converts the 2018 Data Science Bowl's nuclei (CC0) to COCO panoptic format: thing nucleus, stuff background.

datasets/prepare_nuclei.py RAW [OUT]       (OUT: $DETECTRON2_DATASETS/nuclei by default)

RAW holds index.csv (image_id,width,height,num_nuclei), images/<image_id>.png (RGB) and instance_ids/<image_id>.png
(16 bit: 0 background, k the k-th nucleus). Of the 664 images 530 become train, 67 val and 67 test, always the same.
Each microscope has its own image size, so the sizes are spread evenly over the splits.
"""

import argparse
import csv
import hashlib
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eco_m2f.data.datasets.builtin import NUCLEI_CATEGORIES, datasets_root
from eco_m2f.data.images import DataError, open_image
from eco_m2f.data.writing import already_made, describe_segments, whole_folder, write_json, write_panoptic
from eco_m2f.engine.command_line import run

SPLITS = ("train", "val", "test")
HELD_OUT = 67 / 664  # the share of all images that val and test each get
NUCLEUS, BACKGROUND = (category["id"] for category in NUCLEI_CATEGORIES)
BACKGROUND_SEGMENT = 1 << 16  # above any 16-bit nucleus id


def prepare(raw: Path, output: Path, seed: int = 0, overwrite: bool = False) -> bool:
    """Writes the dataset. Returns False if it already exists. Raises DataError for a bad RAW."""
    rows = read_index(raw)
    digest = hashlib.sha256((raw / "index.csv").read_bytes()).hexdigest()
    made_from = {"nuclei": {"index_sha256": digest, "images": len(rows), "seed": seed}}
    if already_made(output, made_from, SPLITS, overwrite):
        return False
    ids = {row["image_id"]: i for i, row in enumerate(rows)}
    with whole_folder(output) as draft, tqdm(total=len(rows), desc="nuclei", unit="image", disable=None) as bar:
        for split, chosen in split_rows(rows, seed).items():
            for folder in (split, f"panoptic_{split}"):
                (draft / folder).mkdir()
            images, annotations = [], []
            for row in chosen:
                image, annotation = _convert(raw, row, ids[row["image_id"]], draft, split)
                images.append(image)
                annotations.append(annotation)
                bar.update()
            path = draft / "annotations" / f"panoptic_{split}.json"
            write_json(path, made_from, images, annotations, NUCLEI_CATEGORIES)
    return True


def read_index(raw: Path) -> list[dict]:
    """The rows of index.csv, sorted by image_id. Raises DataError if a file that they name is missing."""
    index = raw / "index.csv"
    if not index.is_file():
        raise DataError(f"{index} not found: RAW must hold index.csv, images/ and instance_ids/")
    with index.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row.get("image_id") or "")
    if len(rows) < 3:
        raise DataError(f"{index} lists {len(rows)} image(s); three are needed for train, val and test")
    missing = {"image_id", "width", "height", "num_nuclei"} - rows[0].keys()
    if missing:
        raise DataError(f"{index} lacks the column(s) {sorted(missing)}")
    for before, row in zip(rows, rows[1:], strict=False):
        if before["image_id"] == row["image_id"]:
            raise DataError(f"{index} lists image {row['image_id']} twice: delete one line")
    paths = [raw / folder / f"{row['image_id']}.png" for row in rows for folder in ("images", "instance_ids")]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"{index} names files that are missing: {', '.join(absent[:3])} ({len(absent)} in all)")
    return rows


def split_rows(rows: list[dict], seed: int) -> dict[str, list[dict]]:
    """Splits rows into train, val and test. It shuffles within each image size, then takes rows at even distances."""
    rows = sorted(rows, key=lambda row: row["image_id"])
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: (int(row["width"]), int(row["height"])))  # stable: keeps the shuffle within a size
    count = max(1, round(len(rows) * HELD_OUT))
    val, rest = _take_evenly(rows, count)
    test, train = _take_evenly(rest, count)
    return {"train": train, "val": val, "test": test}


def _take_evenly(rows: list[dict], count: int) -> tuple[list[dict], list[dict]]:
    """`count` rows at even distances, and the others."""
    taken = {int((i + 0.5) * len(rows) / count) for i in range(count)}
    return [rows[i] for i in sorted(taken)], [row for i, row in enumerate(rows) if i not in taken]


def _convert(raw: Path, row: dict, image_id: int, draft: Path, split: str) -> tuple[dict, dict]:
    """Writes one image and its panoptic PNG; returns their JSON entries."""
    name = f"{row['image_id']}.png"
    nuclei = _read_nuclei(raw, row)
    ids = np.where(nuclei == 0, BACKGROUND_SEGMENT, nuclei)
    category_of = dict.fromkeys(np.unique(nuclei).tolist(), NUCLEUS) | {BACKGROUND_SEGMENT: BACKGROUND}
    shutil.copyfile(raw / "images" / name, draft / split / name)
    write_panoptic(draft / f"panoptic_{split}" / name, ids)
    height, width = ids.shape
    image = {"id": image_id, "file_name": name, "width": width, "height": height}
    return image, {"image_id": image_id, "file_name": name, "segments_info": describe_segments(ids, category_of)}


def _read_nuclei(raw: Path, row: dict) -> np.ndarray:
    """Instance ids int32 [H, W], checked against the image and the index. Raises DataError."""
    path = raw / "instance_ids" / f"{row['image_id']}.png"
    image_path = raw / "images" / path.name
    image = open_image(image_path, formats=("PNG",)).image
    nuclei, mode, size = np.asarray(open_image(path, "PNG of instances", ("PNG",)).image), image.mode, image.size
    if nuclei.ndim != 2 or nuclei.dtype.kind not in "iu":
        raise DataError(f"{path}: expected one 16-bit channel, got {nuclei.dtype} {list(nuclei.shape)}")
    if mode != "RGB":
        raise DataError(f"{image_path}: expected an RGB image, got mode {mode}; convert it")
    listed = (int(row["width"]), int(row["height"]))
    if not size == nuclei.shape[::-1] == listed:
        raise DataError(
            f"{path}: sizes differ: image {size}, instance ids {nuclei.shape[::-1]}, index.csv {listed} (width, height)"
        )
    count = len(np.setdiff1d(nuclei, [0]))
    if count != int(row["num_nuclei"]):
        raise DataError(f"{path}: {count} nuclei drawn, index.csv says {row['num_nuclei']}; correct one of them")
    return nuclei.astype(np.int32)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="the folder with index.csv, images/ and instance_ids/")
    parser.add_argument("output", type=Path, nargs="?", default=datasets_root() / "nuclei", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (0: the published split)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that was made from other input")
    return parser


def main(args: argparse.Namespace) -> None:
    written = prepare(args.raw, args.output, args.seed, args.overwrite)
    print(f"{args.output}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
