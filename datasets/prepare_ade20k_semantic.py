"""Makes ADE20K's class maps of 150 classes from the official annotation, for ade20k_sem_seg_{train,val}.

datasets/prepare_ade20k_semantic.py [ADEChallengeData2016]     ($DETECTRON2_DATASETS/ADEChallengeData2016 by default)

In annotations/<split>/*.png, 0 is "other" and 1..150 are the classes.
In annotations_detectron2/<split>/*.png, which this writes, 0..149 are the classes and 255 is void.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from eco_m2f.data.datasets.builtin import datasets_root
from eco_m2f.data.panoptic_map import DataError, read_classes
from eco_m2f.data.parallel import each
from eco_m2f.data.writing import whole_folder
from eco_m2f.engine.command_line import run

NUM_CLASSES = 150
VOID_CLASS = 255
SPLITS = ("training", "validation")


def prepare(root: Path, split: str, workers: int = 1, overwrite: bool = False) -> bool:
    """Writes one split. Returns False if it already exists. Raises DataError, FileExistsError."""
    source, output = root / "annotations" / split, root / "annotations_detectron2" / split
    files = sorted(source.glob("*.png"))
    if not files:
        raise DataError(f"{source}: no PNG found; unpack ADEChallengeData2016.zip so that this folder exists")
    missing = [f for f in files if not (root / "images" / split / f.name).with_suffix(".jpg").is_file()]
    if missing:
        raise DataError(f"{missing[0]}: its image is not in {root / 'images' / split} ({len(missing)} images missing)")
    present = {p.name for p in output.iterdir()} if output.is_dir() else set()
    if present == {f.name for f in files} and not overwrite:
        return False
    if present and not overwrite:
        raise FileExistsError(f"{output} holds other files: use --overwrite to replace them, or move them away")
    with whole_folder(output) as draft:
        for _ in each(partial(_convert, output=draft), files, workers, title=f"ADE20K {split}"):
            pass
    return True


def class_map(labels: np.ndarray, source: Path | str) -> np.ndarray:
    """Labels 0..150 -> classes, uint8 of the same shape. Raises DataError for others."""
    if labels.max(initial=0) > NUM_CLASSES:
        raise DataError(f"{source}: label {labels.max()} is above {NUM_CLASSES}: use the PNGs of ADEChallengeData2016")
    return labels - np.uint8(1)  # 0 becomes 255


def _convert(path: Path, output: Path) -> None:
    Image.fromarray(class_map(read_classes(path), path)).save(output / path.name)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = datasets_root() / "ADEChallengeData2016"
    parser.add_argument("root", type=Path, nargs="?", default=default, help="folder with images and annotations")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="splits to convert")
    parser.add_argument("--workers", type=int, default=4, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing class maps")
    return parser


def main(args: argparse.Namespace) -> None:
    for split in args.splits:
        written = prepare(args.root, split, args.workers, args.overwrite)
        print(f"{args.root} {split}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
