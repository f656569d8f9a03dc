"""Cityscapes: panoptic PNGs, JSON and training ids from a generated gtFine tree."""

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from PIL import Image

from eco_m2f.data.panoptic_map import DataError, read_ids

ROAD, SKY, PERSON, CAR, EGO, TRAILER = 7, 23, 24, 26, 1, 30


@pytest.fixture(scope="module")
def cityscapes(script):
    return script("datasets/prepare_cityscapes_panoptic")


def instance_ids() -> np.ndarray:
    """Sky above road, two cars, a group of people without instances (crowd), and labels that are not evaluated."""
    ids = np.full((32, 64), SKY, dtype=np.uint16)
    ids[16:] = ROAD
    ids[14:20, 5:15], ids[14:20, 15:25] = CAR * 1000, CAR * 1000 + 1
    ids[12:18, 40:50] = PERSON
    ids[20:22, 40:50] = TRAILER * 1000 + 2
    ids[30:] = EGO
    return ids


@pytest.fixture
def raw(tmp_path):
    """gtFine and leftImg8bit of one image in each of two cities."""
    base = tmp_path / "cityscapes"
    for city, shift in (("aachen", 0), ("ulm", 3)):
        name = f"{city}_000000_000019"
        for kind, array in (("gtFine", np.roll(instance_ids(), shift, 1)), ("leftImg8bit", None)):
            folder = base / kind / "train" / city
            folder.mkdir(parents=True)
            if array is not None:
                Image.fromarray(array).save(folder / f"{name}_gtFine_instanceIds.png")
            else:
                Image.new("RGB", (64, 32), (shift, 9, 9)).save(folder / f"{name}_leftImg8bit.png")
    return base


@pytest.mark.parametrize("workers", [1, 2])
def test_segments(cityscapes, raw, workers):
    assert cityscapes.prepare(raw, "train", workers)
    content = json.loads((raw / "gtFine" / "cityscapes_panoptic_train.json").read_text())
    assert len(content["categories"]) == 19 and sum(c["isthing"] for c in content["categories"]) == 8
    assert [a["image_id"] for a in content["annotations"]] == ["aachen_000000_000019", "ulm_000000_000019"]
    annotation = content["annotations"][0]
    ids = read_ids(raw / "gtFine" / "cityscapes_panoptic_train" / annotation["file_name"])
    source = instance_ids()
    ignored = np.isin(source, [EGO, TRAILER * 1000 + 2])
    np.testing.assert_array_equal(ids, np.where(ignored, 0, source))
    segments = {s["id"]: (s["category_id"], s["iscrowd"], s["area"]) for s in annotation["segments_info"]}
    assert segments == {
        ROAD: (ROAD, 0, int((source == ROAD).sum())),
        SKY: (SKY, 0, int((source == SKY).sum())),
        PERSON: (PERSON, 1, 60),
        CAR * 1000: (CAR, 0, 60),
        CAR * 1000 + 1: (CAR, 0, 60),
    }


def test_training_ids(cityscapes, raw):
    cityscapes.prepare(raw, "train")
    path = raw / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelTrainIds.png"
    got, source = np.asarray(Image.open(path)), instance_ids()
    assert got.dtype == np.uint8
    for label, train_id in (
        (ROAD, 0),
        (SKY, 10),
        (PERSON, 11),
        (EGO, 255),
        (TRAILER * 1000 + 2, 255),
        (CAR * 1000, 13),
    ):
        assert (got[source == label] == train_id).all()


def test_training_ids_of_cityscapesscripts_are_kept(cityscapes, raw):
    path = raw / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_labelTrainIds.png"
    path.write_bytes(b"made before")
    cityscapes.prepare(raw, "train")
    assert path.read_bytes() == b"made before"


def test_detectron2_reads_the_result(cityscapes, raw, monkeypatch):
    """The paths are relative, because its loader cuts them at the first dot."""
    cityscapes.prepare(raw, "train")
    monkeypatch.chdir(raw)
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_train").as_dict()
    gt = "gtFine/cityscapes_panoptic_train"
    records = load_cityscapes_panoptic("leftImg8bit/train", gt, f"{gt}.json", meta)
    assert [r["image_id"] for r in records] == ["aachen_000000_000019", "ulm_000000_000019"]
    assert {s["category_id"] for s in records[0]["segments_info"]} == {0, 10, 11, 13}


def test_a_second_run_does_nothing(cityscapes, raw):
    assert cityscapes.prepare(raw, "train") and not cityscapes.prepare(raw, "train")
    assert cityscapes.prepare(raw, "train", overwrite=True)


def test_incomplete_downloads_are_explained(cityscapes, raw):
    with pytest.raises(DataError, match="no <city>.*unpack gtFine_trainvaltest.zip"):
        cityscapes.prepare(raw, "val")
    (raw / "leftImg8bit" / "train" / "ulm" / "ulm_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError, match="ulm_000000_000019_leftImg8bit.png is missing"):
        cityscapes.prepare(raw, "train")
    assert not (raw / "gtFine" / "cityscapes_panoptic_train.json").exists()


def test_a_broken_map_is_named_and_no_json_is_left(cityscapes, raw):
    path = raw / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="ulm_000000_000019_gtFine_instanceIds.png: PNG of gtFine cannot be read"):
        cityscapes.prepare(raw, "train")
    assert sorted(p.name for p in (raw / "gtFine").iterdir()) == ["train"]
