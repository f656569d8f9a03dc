"""Every bad image or annotation ends in one message with the cause and the remedy."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import Tiny
from tried_tools import assert_names

from eco_m2f.data.panoptic_map import ids_to_rgb
from eco_m2f.derived.dataset import DerivedDataset

pytestmark = pytest.mark.slow


def spoil_json(tiny: Tiny, split: str, change) -> None:
    content = json.loads(tiny.json(split).read_text())
    change(content)
    tiny.json(split).write_text(json.dumps(content))


def panoptic(tiny: Tiny, split: str, i: int = 0):
    return tiny.base / "data" / f"panoptic_{split}" / f"{i:06d}.png"


def picture(tiny: Tiny, split: str, i: int = 0):
    return tiny.base / "data" / split / f"{i:06d}.png"


def empty(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["segments_info"] = []


def crowds(content: dict) -> None:
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1


@pytest.mark.parametrize("change", [empty, crowds])
def test_images_without_anything_to_find_are_trained_on_evaluated_and_derived(tools, spoilt, change):
    """They train the model to find nothing. An image without segments has the quality of a dataset without any."""
    for split in ("train", "val"):
        spoil_json(spoilt, split, change)
        if change is empty:
            for i in range(2 if split == "train" else 1):
                Image.fromarray(ids_to_rgb(np.zeros((64, 64), np.int32))).save(panoptic(spoilt, split, i))
    assert tools.train(data=spoilt) == 0
    assert tools.evaluate(data=spoilt) == 0
    assert tools.derive(data=spoilt) == 0
    assert np.isfinite(DerivedDataset.load(tools.output / "derived").quality).all()


@pytest.mark.parametrize(
    "size, mapper",
    [((50, 1), "mask_former_panoptic"), ((1, 50), "coco_panoptic_lsj"), ((1, 1), "mask_former_panoptic")],
)
def test_images_one_pixel_thin_are_trained_on_evaluated_and_derived(tools, spoilt, size, mapper):
    def shrink(content):
        for image, annotation in zip(content["images"], content["annotations"]):
            image["height"], image["width"] = size
            annotation["segments_info"] = [{"id": 5, "category_id": 1, "iscrowd": 0, "area": size[0] * size[1]}]

    for split, count in (("train", 2), ("val", 1)):
        spoil_json(spoilt, split, shrink)
        for i in range(count):
            Image.fromarray(ids_to_rgb(np.full(size, 5, np.int32))).save(panoptic(spoilt, split, i))
            Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(picture(spoilt, split, i))
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[32, 32]"]
    augmented = ["INPUT.IMAGE_SIZE", 64, "INPUT.COLOR_AUG_SSD", True, *crop]
    assert tools.train("INPUT.DATASET_MAPPER_NAME", mapper, *augmented, data=spoilt) == 0
    assert tools.evaluate(data=spoilt) == 0
    assert tools.derive(data=spoilt) == 0


def test_png_with_a_segment_that_the_json_lacks(tools, spoilt):
    spoil_json(spoilt, "train", lambda content: [a["segments_info"].pop() for a in content["annotations"]])
    assert_names(tools.message(tools.train(data=spoilt)), "data/panoptic_train/00000", "check_dataset")


def test_json_with_a_segment_that_the_png_lacks(tools, spoilt):
    def add(content):
        for a in content["annotations"]:
            a["segments_info"].append({**a["segments_info"][0], "id": 77777})

    spoil_json(spoilt, "train", add)
    assert_names(tools.message(tools.train(data=spoilt)), "data/panoptic_train/00000", "77777", "check_dataset")


@pytest.mark.parametrize("run", ["evaluate", "derive"])
def test_png_and_json_that_disagree_in_evaluation(tools, spoilt, run):
    spoil_json(spoilt, "val", lambda content: [a["segments_info"].pop() for a in content["annotations"]])
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), "000000.png")


@pytest.mark.parametrize("run, split", [("train", "train"), ("evaluate", "val"), ("derive", "val")])
def test_unreadable_image(tools, spoilt, run, split):
    for i in range(2 if split == "train" else 1):
        picture(spoilt, split, i).write_bytes(b"not a PNG")
    message = tools.message(getattr(tools, run)(data=spoilt))
    assert_names(message, f"data/{split}/00000", "cannot be read", "restore it")


@pytest.mark.parametrize("run, split", [("evaluate", "val"), ("derive", "val")])
def test_unreadable_panoptic_png(tools, spoilt, run, split):
    panoptic(spoilt, split).write_bytes(b"not a PNG")
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), "panoptic_val/000000.png")


@pytest.mark.parametrize("run, split", [("evaluate", "val"), ("derive", "val"), ("train", "train")])
def test_missing_panoptic_png(tools, spoilt, run, split):
    for i in range(2 if split == "train" else 1):
        panoptic(spoilt, split, i).unlink()
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), f"panoptic_{split}/00000")
