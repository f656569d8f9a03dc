"""Makes Cityscapes' panoptic PNGs and JSON, and its labelTrainIds PNGs, from gtFine, without cityscapesscripts.

datasets/prepare_cityscapes_panoptic.py [CITYSCAPES] [--splits train val]     ($DETECTRON2_DATASETS/cityscapes)

The result has the layout that detectron2 reads, as of cityscapesscripts' createPanopticImgs and createTrainIdLabelImgs:
gtFine/cityscapes_panoptic_<split>/*_gtFine_panoptic.png, gtFine/cityscapes_panoptic_<split>.json and
gtFine/<split>/<city>/*_gtFine_labelTrainIds.png. It follows the rules of https://www.cityscapes-dataset.com. A pixel of
*_instanceIds.png is label * 1000 + instance, or only the label if the instances cannot be separated. Only the 19
evaluated labels become segments. A thing without an instance number is a crowd.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from PIL import Image

from eco_m2f.data.datasets.builtin import datasets_root
from eco_m2f.data.images import open_image
from eco_m2f.data.panoptic_map import VOID, DataError
from eco_m2f.data.parallel import each
from eco_m2f.data.writing import describe_segments, whole_folder, write_json, write_panoptic
from eco_m2f.engine.command_line import run

SUFFIX = "_gtFine_instanceIds.png"
INSTANCES = 1000  # instanceIds from here on contain an instance number
IGNORED = 255  # trainId of labels that are not evaluated
CATEGORIES = [{key: c[key] for key in ("id", "name", "isthing", "color")} for c in CITYSCAPES_CATEGORIES]
THINGS = {c["id"] for c in CATEGORIES if c["isthing"]}
EVALUATED = {c["id"] for c in CATEGORIES}


def prepare(cityscapes: Path, split: str, workers: int = 1, overwrite: bool = False) -> bool:
    """Writes one split. Returns False if its JSON already exists. Raises DataError if files are missing."""
    gt, images = cityscapes / "gtFine", cityscapes / "leftImg8bit" / split
    target = gt / f"cityscapes_panoptic_{split}.json"
    if target.is_file() and not overwrite:
        return False
    sources = sorted((gt / split).glob(f"*/*{SUFFIX}"))
    if not sources:
        raise DataError(f"{gt / split}: no <city>/*{SUFFIX} found; unpack gtFine_trainvaltest.zip into {cityscapes}")
    missing = [p for p in map(partial(_image_of, images), sources) if not p.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is missing ({len(missing)} in all); unpack leftImg8bit_trainvaltest.zip")
    target.unlink(missing_ok=True)  # the JSON marks a finished split
    with whole_folder(gt / f"cityscapes_panoptic_{split}") as draft:
        entries = list(each(partial(convert, output=draft), sources, workers, title=f"cityscapes {split}"))
    made_from = {"cityscapes": split}
    write_json(target, made_from, [image for image, _ in entries], [a for _, a in entries], CATEGORIES)
    return True


def convert(source: Path, output: Path) -> tuple[dict, dict]:
    """Writes the panoptic PNG of an *_instanceIds.png, and labelTrainIds next to it. Returns the JSON entries."""
    instance_ids = _read(source)
    labels = np.where(instance_ids >= INSTANCES, instance_ids // INSTANCES, instance_ids)
    ids = np.where(np.isin(labels, list(EVALUATED)), instance_ids, VOID)
    name = source.name.removesuffix(SUFFIX)
    write_panoptic(output / f"{name}_gtFine_panoptic.png", ids)
    _write_train_ids(source.with_name(f"{name}_gtFine_labelTrainIds.png"), labels)
    category_of = {i: i // INSTANCES if i >= INSTANCES else i for i in np.unique(ids).tolist()}
    crowds = {i for i, category in category_of.items() if i < INSTANCES and category in THINGS}
    height, width = ids.shape
    image_file = f"{source.parent.name}/{name}_leftImg8bit.png"
    image = {"id": name, "file_name": image_file, "width": width, "height": height}
    segments = describe_segments(ids, category_of, crowds)
    return image, {"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": segments}


def _read(source: Path) -> np.ndarray:
    ids = np.asarray(open_image(source, "PNG of gtFine", ("PNG",)).image)
    if ids.ndim != 2:
        raise DataError(f"{source}: expected one 16-bit channel, got shape {ids.shape}")
    return ids.astype(np.int32)


def _write_train_ids(path: Path, labels: np.ndarray) -> None:
    """Writes the semantic map of training ids 0..18, void 255. It keeps an existing map of cityscapesscripts."""
    if path.is_file():
        return
    table = np.full(INSTANCES, IGNORED, dtype=np.uint8)
    for category in CITYSCAPES_CATEGORIES:
        table[category["id"]] = category["trainId"]
    draft = path.with_suffix(".tmp")
    Image.fromarray(table[labels]).save(draft, format="PNG")
    draft.replace(path)


def _image_of(images: Path, source: Path) -> Path:
    return images / source.parent.name / (source.name.removesuffix(SUFFIX) + "_leftImg8bit.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = datasets_root() / "cityscapes"
    parser.add_argument("cityscapes", type=Path, nargs="?", default=default, help="folder with gtFine and leftImg8bit")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["train", "val"], help="to convert")
    parser.add_argument("--workers", type=int, default=4, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="also convert splits whose JSON already exists")
    return parser


def main(args: argparse.Namespace) -> None:
    for split in args.splits:
        written = prepare(args.cityscapes, split, args.workers, args.overwrite)
        print(f"{args.cityscapes} {split}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
