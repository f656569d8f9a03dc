"""Makes class-map PNGs from COCO panoptic annotation, for mIoU, in panoptic_semseg_<split>2017.

datasets/prepare_coco_semantic.py [COCO] [--splits val train]     (COCO: $DETECTRON2_DATASETS/coco by default)

Each pixel gets the contiguous class id 0..132 of its segment, also in crowds. Void becomes 255.
It also converts other datasets in COCO panoptic format: give the paths with --json, --panoptic and --output.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from eco_m2f.data.annotations import read
from eco_m2f.data.datasets.builtin import datasets_root
from eco_m2f.data.panoptic_map import DataError, decode, index_map, read_ids
from eco_m2f.data.parallel import each
from eco_m2f.data.schema import PANOPTIC, PanopticAnnotation
from eco_m2f.data.writing import whole_folder
from eco_m2f.engine.command_line import run

VOID_CLASS = 255


def prepare(panoptic_json: Path, panoptic_root: Path, output: Path, workers: int = 1, overwrite: bool = False) -> bool:
    """Writes one PNG per annotation. Returns False if all already exist. Raises DataError, FileExistsError."""
    content = read(panoptic_json, PANOPTIC)
    if len(content.categories) > VOID_CLASS:
        raise DataError(f"{panoptic_json}: {len(content.categories)} classes do not fit into a class map of 8 bits")
    classes = {category.id: i for i, category in enumerate(content.categories)}
    annotations = content.annotations
    if _complete(output, annotations) and not overwrite:
        return False
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"{output} holds other files: use --overwrite to replace them, or move them away")
    with whole_folder(output) as draft:
        convert = partial(_convert, panoptic_root=panoptic_root, output=draft, classes=classes)
        for _ in each(convert, annotations, workers, title=output.name):
            pass
    return True


def class_map(ids: np.ndarray, segments: list[dict], classes: dict[int, int], source: Path | str) -> np.ndarray:
    """Segment ids [H, W] -> contiguous classes, uint8 [H, W], void 255. Raises DataError for an unknown category."""
    unknown = sorted({s["category_id"] for s in segments} - classes.keys())
    if unknown:
        raise DataError(f"{source}: category_id {unknown} is not among the JSON's categories; add it there")
    table = np.array([*(classes[s["category_id"]] for s in segments), VOID_CLASS], dtype=np.uint8)
    positions = decode(index_map(ids, [s["id"] for s in segments], source))
    return table[np.minimum(positions, len(segments))]


def _complete(output: Path, annotations: list[PanopticAnnotation]) -> bool:
    return bool(annotations) and all((output / a.file_name).is_file() for a in annotations)


def _convert(annotation: PanopticAnnotation, panoptic_root: Path, output: Path, classes: dict[int, int]) -> None:
    path = panoptic_root / annotation.file_name
    segments = [s.as_dict() for s in annotation.segments_info]
    semantic = class_map(read_ids(path, [s["id"] for s in segments]), segments, classes, path)
    Image.fromarray(semantic).save(output / annotation.file_name)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, nargs="?", default=datasets_root() / "coco", help="folder of COCO")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["val"], help="splits of COCO 2017")
    parser.add_argument("--json", type=Path, help="panoptic JSON of another dataset; needs --panoptic and --output")
    parser.add_argument("--panoptic", type=Path, help="folder of panoptic PNGs of --json")
    parser.add_argument("--output", type=Path, help="folder to write, for --json")
    parser.add_argument("--workers", type=int, default=4, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing class maps")
    return parser


def main(args: argparse.Namespace) -> None:
    own = (args.json, args.panoptic, args.output)
    if any(own) and not all(own):
        raise ValueError("--json, --panoptic and --output go together: give all three or none")
    jobs = [own] if all(own) else [_coco_paths(args.coco, split) for split in args.splits]
    for panoptic_json, panoptic_root, output in jobs:
        written = prepare(panoptic_json, panoptic_root, output, args.workers, args.overwrite)
        print(f"{output}: {'written' if written else 'already there'}")


def _coco_paths(coco: Path, split: str) -> tuple[Path, Path, Path]:
    return (
        coco / "annotations" / f"panoptic_{split}2017.json",
        coco / f"panoptic_{split}2017",
        coco / f"panoptic_semseg_{split}2017",
    )


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
