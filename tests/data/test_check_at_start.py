"""What every tool checks before it starts, and that all datasets of a run get the training set's classes."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from eco_m2f.data.check import check_at_start, check_class_count, check_dataset
from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.panoptic_map import DataError


@pytest.fixture
def two(tree, forget):
    """The specs of a training set and of its copy after `change`."""

    def write(change=lambda content: None, extra: str = "") -> list[str]:
        content = json.loads(tree.save().json.read_text())
        change(content)
        path = tree.base / "val.json"
        path.write_text(json.dumps(content))
        return [f"name=train,{tree.spec}{extra}", f"name=val,{tree.spec.replace('pan.json', 'val.json')}{extra}"]

    return write


def reverse(content: dict) -> None:
    content["categories"].reverse()


@pytest.mark.parametrize("order", [1, -1])
def test_classes_follow_the_training_set(two, order):
    """With any order of the categories in the other JSON, and of the entries."""
    register_from_config(two(reverse)[::order], ["train"])
    train, val = MetadataCatalog.get("train"), MetadataCatalog.get("val")
    assert val.stuff_classes == train.stuff_classes == ["car", "sky", "dog"]
    assert val.thing_dataset_id_to_contiguous_id == {7: 0, 90: 2}
    check_at_start(["train", "val"], "train", ["val"])
    classes = [
        [s["category_id"] for s in r["segments_info"]] for name in ("train", "val") for r in DatasetCatalog.get(name)
    ]
    assert classes[:2] == classes[2:]


def test_classes_follow_the_first_where_no_training_set_is_named(two):
    register_from_config(two(reverse))
    assert MetadataCatalog.get("val").stuff_classes == ["car", "sky", "dog"]


def test_registering_again_keeps_the_order(two):
    train, val = two(reverse)
    register_from_config([train, val], ["train"])
    register_from_config([val])
    assert MetadataCatalog.get("val").stuff_classes == ["car", "sky", "dog"]


def test_registered_apart_in_other_orders_is_refused(two):
    train, val = two(reverse)
    register_from_config([train])
    register_from_config([val])
    with pytest.raises(ValueError, match="same categories in different orders: register both by one list"):
        check_at_start(["val"], "train")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda c: c["categories"][0].update(name="lorry"), r"it lacks \[7 car.* and adds \[7 lorry"),
        (lambda c: c["categories"][0].update(isthing=0), r"7 car \(thing\).*7 car \(stuff\)"),
        (lambda c: c["categories"].append({"id": 8, "name": "bus", "isthing": 1}), r"adds \[8 bus"),
    ],
)
def test_other_categories_than_the_training_sets_are_refused(two, change, expected):
    register_from_config(two(change), ["train"])
    check_at_start(["val"])
    with pytest.raises(ValueError, match=f"dataset 'val' are not those of the training set 'train'.*{expected}"):
        check_at_start(["train", "val"], "train")
    kinds = [f.kind for f in check_dataset("val", reference="train")]
    assert kinds == ["categories other than the training set's"] and check_dataset("val") == []


def test_boxes_of_other_categories_are_refused(own):
    path, content = own
    content["categories"][0]["name"] = "ten"
    path.with_name("val.json").write_text(json.dumps(content))
    register_from_config([f"name={n},images={path.parent},boxes={path.with_name(f)}" for n, f in NAMES])
    with pytest.raises(ValueError, match="9 nine.*9 ten"):
        check_at_start(["train", "val"], "train")


NAMES = (("train", "boxes.json"), ("val", "val.json"))


def test_json_that_changed_after_it_was_registered(two, tree):
    register_from_config(two())
    content = json.loads(tree.json.read_text())
    content["categories"][0]["name"] = "lorry"
    tree.json.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="pan.json are not those of dataset 'train' as it is registered"):
        check_at_start(["train"])


@pytest.mark.parametrize("name", ["coco_2017_val_panoptic", "cityscapes_fine_panoptic_val", "coco_2017_val"])
def test_official_names_are_read_by_the_same_reader(name, tmp_path, monkeypatch):
    path = tmp_path / "official.json"
    path.write_text('{"images": [], "annotations": [], "categories": [{"id": "1"}]}')
    meta = MetadataCatalog.get(name)
    monkeypatch.setitem(vars(meta), "panoptic_json" if "panoptic" in name else "json_file", str(path))
    with pytest.raises(DataError, match="official.json: .*categories"):
        check_at_start([name])


@pytest.mark.parametrize("which", ["image", "panoptic"])
def test_missing_files_are_named(two, tree, which):
    register_from_config(two())
    check_at_start(["train"])
    getattr(tree, which)(1).unlink()
    with pytest.raises(DataError, match=rf"missing .*{getattr(tree, which)(1)}.*datasets/README.md"):
        check_at_start(["train"])


def _write_class_maps(tree, classes=(0, 1, 2)) -> None:
    """car 300, dog 70000 (in the second image a car), sky 9; void 255."""
    (tree.base / "classes").mkdir(exist_ok=True)
    car, sky, dog = classes
    for i in (1, 2):
        png = np.array(Image.open(tree.panoptic(i))).astype(int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        table = {0: 255, 300: car, 9: sky, 70000: dog if i == 1 else car}
        made = np.vectorize(table.get)(ids).astype(np.uint8)
        Image.fromarray(made).save(tree.base / "classes" / f"{i}.png")


def test_class_maps_are_compared_with_the_panoptic_png(two, tree):
    specs = two(extra=f",sem_seg={tree.base / 'classes'}")
    _write_class_maps(tree)
    register_from_config(specs)
    check_at_start(["train"])
    assert check_dataset("train") == []
    _write_class_maps(tree, (1, 0, 2))
    with pytest.raises(DataError, match=r"class map contradicts panoptic PNG: .*classes/1.png"):
        check_at_start(["train"])
    assert [f.kind for f in check_dataset("train")] == ["class map contradicts panoptic PNG"] * 2
    _write_class_maps(tree, (255, 255, 255))
    assert [f.kind for f in check_dataset("train")] == ["class map contradicts panoptic PNG"] * 2
    _write_class_maps(tree, (0, 1, 3))
    assert "unknown class in a class map" in {f.kind for f in check_dataset("train")}


def _instances(tree, change=lambda c: None) -> str:
    whole = [[0, 0, 60, 0, 60, 40, 0, 40]]  # objects may overlap
    objects = [{"image_id": i, "category_id": c, "segmentation": whole} for i, c in ((1, 7), (1, 90), (2, 7), (2, 7))]
    content = {"images": [{"id": 1}, {"id": 2}], "annotations": objects}
    content["categories"] = [{"id": 7, "name": "car"}, {"id": 90, "name": "dog"}]
    change(content)
    (tree.base / "instances.json").write_text(json.dumps(content))
    return f",instances={tree.base / 'instances.json'}"


MASKS_DIFFER = "instances contradict panoptic PNG"
TURNED = {"size": [60, 40], "counts": [0, 2400]}


def test_an_instance_json_is_compared_with_the_panoptic_one(two, tree):
    register_from_config(two(extra=_instances(tree)))
    check_at_start(["train"], evaluated=["train"])
    assert check_dataset("train") == []
    for change, kind, refused in (
        (lambda c: c["categories"][0].update(id=8), "unknown category", True),
        (lambda c: c["categories"][0].update(name="lorry"), "instances of other categories", True),
        (lambda c: (c["images"].pop(), c["annotations"].clear()), "image missing in the instance JSON", True),
        (lambda c: c["annotations"].pop(1), "instances contradict panoptic JSON", False),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 9, 9]]), "object without a mask", True),
        (lambda c: [o.update(segmentation=[[1, 30, 9, 30, 9, 39]]) for o in c["annotations"]], MASKS_DIFFER, True),
        (lambda c: c["annotations"].__delitem__(slice(0, 2)), MASKS_DIFFER, True),
        (lambda c: c["annotations"][1].update(segmentation=TURNED), "unusable mask in the instance JSON", True),
        (lambda c: c["annotations"][1].update(segmentation={**TURNED, "counts": "zz#"}), "unusable mask", True),
    ):
        _instances(tree, change)
        assert any(f.kind.startswith(kind) for f in check_dataset("train"))
        check_at_start(["train"])  # training does not read it
        if refused:
            with pytest.raises(ValueError, match="instances.json"):
                check_at_start(["train"], evaluated=["train"])


def test_a_split_with_a_category_more_is_not_met_by_another_number(two):
    """A NUM_CLASSES that fits one of them does not fit the other."""
    register_from_config(two(lambda c: c["categories"].append({"id": 8, "name": "cat", "isthing": 1})))
    with pytest.raises(ValueError, match="categories of dataset 'val' are not those of .*adds .8 cat"):
        check_class_count("val", 3, reference="train")
    with pytest.raises(ValueError, match="NUM_CLASSES is 5, but dataset 'train' has 3"):
        check_class_count("train", 5, reference="train")


def test_a_name_too_long_for_the_file_system_is_a_missing_file(tree, forget):
    tree.content["images"][0]["file_name"] = "a" * 3000
    tree.save()
    register_from_config([f"name=train,{tree.spec}"])
    with pytest.raises(DataError, match="missing image"):
        check_at_start(["train"])
    assert "missing image" in {f.kind for f in check_dataset("train")}
