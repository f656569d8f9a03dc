"""Datasets of boxes: registering, reading, mapping. The toy set's boxes are its panoptic objects."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from eco_m2f.data.check import check_class_count
from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.loader import build_train_loader
from eco_m2f.data.mappers import build_train_mapper
from eco_m2f.data.panoptic_map import DataError, read_ids
from eco_m2f.data.toy import CATEGORIES, ToySpec, make_toy_dataset


def register(path, name="own_boxes"):
    register_from_config([f"name={name},images={path.parent},boxes={path}"])
    return DatasetCatalog.get(name)


@pytest.fixture
def box_cfg(cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "detr"
    return cfg


def test_records_and_metadata(own):
    (record,) = register(own[0])
    meta = MetadataCatalog.get("own_boxes")
    assert meta.thing_classes == ["four", "nine"] and meta.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    assert meta.thing_colors[0] == (1, 2, 3) and meta.evaluator_type == "coco"
    assert [a["category_id"] for a in record["annotations"]] == [1, 0, 0]
    assert record["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    register(own[0])  # again: harmless
    check_class_count("own_boxes", 2, "boxes")


def test_mistakes_are_explained(own, forget):
    path, content = own
    register(path)
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but dataset 'own_boxes' has 2"):
        check_class_count("own_boxes", 3, "boxes")
    with pytest.raises(ValueError, match="'toy_panoptic_val' has no boxes"):
        check_class_count("toy_panoptic_val", 9, "boxes")
    with pytest.raises(ValueError, match="'own_boxes' has no panoptic annotation"):
        check_class_count("own_boxes", 2)
    with pytest.raises(ValueError, match="'nothing' is not registered.*toy_detection_train"):
        check_class_count("nothing", 2, "boxes")
    with pytest.raises(ValueError, match="unknown key 'json'"):
        register_from_config([f"name=x,images=a,boxes={path},json=b"])
    with pytest.raises(DataError, match="none.json: detection JSON not found"):
        register(path.parent / "none.json", "other")
    path.with_name("list.json").write_text("[1]")
    with pytest.raises(DataError, match="not in COCO detection format, it holds a list"):
        register(path.with_name("list.json"), "other")
    for spoil, message in (
        (lambda c: c.pop("categories"), r"lacks \['categories'\]"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] \(id 2, image_id 1\) lacks bbox"),
        (lambda c: c["annotations"][1].update(bbox=None), r"\(id 2, image_id 1\): bbox is None"),
        (lambda c: c["categories"][0].pop("name"), "category entry: .* lacks name"),
        (lambda c: c["categories"].append(c["categories"][0]), "ids of categories must be unique"),
        (lambda c: c.update(images=[], annotations=[]), "`images` is empty"),
    ):
        spoiled = json.loads(json.dumps(content))
        spoil(spoiled)
        path.write_text(json.dumps(spoiled))
        with pytest.raises(DataError, match=message):
            register(path, "own_boxes" if "empty" in message else "spoiled")


def test_boxes_come_as_corners_without_crowds(own, box_cfg):
    output = build_train_mapper(box_cfg)(register(own[0])[0])
    instances = output["instances"]
    assert instances.image_size == (40, 60) and output["image"].shape == (3, 40, 60)
    assert instances.gt_boxes.tensor.tolist() == [[10, 4, 30, 12], [30, 20, 40, 35]]
    assert instances.gt_classes.tolist() == [1, 0] and instances.gt_classes.dtype == torch.int64
    assert (output["height"], output["width"], output["image_id"]) == (40, 60, 1)


def test_boxes_move_with_the_image(own, box_cfg):
    box_cfg.INPUT.RANDOM_FLIP, box_cfg.INPUT.MIN_SIZE_TRAIN = "horizontal", (80, 120)
    box_cfg.INPUT.CROP.ENABLED, box_cfg.INPUT.CROP.TYPE, box_cfg.INPUT.CROP.SIZE = True, "relative", [0.6, 0.7]
    mapper, record, counts, sizes = build_train_mapper(box_cfg), register(own[0])[0], set(), set()
    for seed in range(40):
        np.random.seed(seed)
        output = mapper(record)
        image, instances = output["image"].numpy()[0], output["instances"]
        counts.add(len(instances))
        sizes.add(image.shape)
        for (x0, y0, x1, y1), c in zip(instances.gt_boxes.tensor.round().int().tolist(), instances.gt_classes):
            assert 0 <= x0 <= x1 <= image.shape[1] and 0 <= y0 <= y1 <= image.shape[0]
            inner = image[y0 + 6 : max(y1 - 6, 0), x0 + 6 : max(x1 - 6, 0)]
            if inner.size:
                assert (inner > 150).all() == (c == 1)
    assert counts == {1, 2} and len(sizes) > 2  # some crops lost a box


@pytest.mark.parametrize("change", [lambda a: a.clear(), lambda a: [o.update(iscrowd=1) for o in a]])
def test_a_training_set_without_an_object_is_named(own, box_cfg, change):
    path, content = own
    change(content["annotations"])
    path.write_text(json.dumps(content))
    register(path)
    box_cfg.DATASETS.TRAIN = ("own_boxes",)
    with pytest.raises(DataError, match=f"{path.name}: no image has an object that is not a crowd"):
        build_train_loader(box_cfg, seed=0)


def test_a_dataset_without_boxes_is_named(tree, forget, box_cfg):
    register_from_config([f"name=own,{tree.spec}"])
    with pytest.raises(DataError, match="has no boxes"):
        build_train_mapper(box_cfg)(DatasetCatalog.get("own")[0])


def test_the_toy_sets_boxes_are_those_of_its_segments(tmp_path):
    make_toy_dataset(tmp_path, ToySpec(num_train=30, num_val=1, size=64))
    content = json.loads((tmp_path / "annotations" / "detection_train.json").read_text())
    panoptic = json.loads((tmp_path / "annotations" / "panoptic_train.json").read_text())
    assert content["images"] == panoptic["images"]
    assert content["categories"] == [c for c in CATEGORIES if c["isthing"]]
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert {a["iscrowd"] for a in content["annotations"]} == {0, 1}
    things, found = {c["id"] for c in content["categories"]}, iter(content["annotations"])
    for annotation in panoptic["annotations"]:
        ids = read_ids(tmp_path / "panoptic_train" / annotation["file_name"])
        for s in annotation["segments_info"]:
            if s["category_id"] in things:
                a = next(found)
                rows, columns = np.nonzero(ids == s["id"])
                x, y, w, h = a["bbox"]
                assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
                assert (a["area"], a["image_id"]) == (rows.size, annotation["image_id"])
                assert (a["category_id"], a["iscrowd"]) == (s["category_id"], s["iscrowd"])
    assert next(found, None) is None


def test_a_toy_set_without_boxes_gets_them(tmp_path):
    spec = ToySpec(num_train=3, num_val=1, size=64)
    make_toy_dataset(tmp_path, spec)
    path = tmp_path / "annotations" / "detection_val.json"
    before = path.read_bytes()
    path.unlink()
    assert not make_toy_dataset(tmp_path, spec)
    assert path.read_bytes() == before


def test_the_toy_set_is_registered():
    meta = MetadataCatalog.get("toy_detection_train")
    assert meta.thing_classes == ["disk", "ring", "triangle", "square", "star"]
    assert meta.json_file.endswith("toy/annotations/detection_train.json")
    check_class_count("toy_detection_val", 5, "boxes")
