"""The classes of a model: from a registered dataset, and from a file."""

import pytest

from eco_m2f.data.categories import check_same_classes
from eco_m2f.data.classes import check_stored, dataset_classes
from eco_m2f.data.datasets import register_from_config

CAR, SKY = (
    {"id": 7, "name": "car", "isthing": 1, "color": [255, 0, 0]},
    {"id": 3, "name": "sky", "isthing": 0, "color": [0, 0, 255]},
)


def test_classes_of_a_registered_dataset(tree, forget):
    register_from_config([f"name=own,{tree.spec}"])
    car, sky, dog = dataset_classes("own")
    assert (car, sky) == (CAR, SKY)
    assert (dog["id"], dog["isthing"]) == (90, 1) and len(dog["color"]) == 3  # generated, because the JSON has none
    assert check_stored(dataset_classes("own"), "x.pth") == [car, sky, dog]


def test_classes_of_boxes_and_of_class_maps(own, forget):
    register_from_config([f"name=boxes,images={own[0].parent},boxes={own[0]}"])
    assert [(c["id"], c["name"], c["isthing"]) for c in dataset_classes("boxes")] == [(4, "four", 1), (9, "nine", 1)]
    assert {c["isthing"] for c in dataset_classes("ade20k_sem_seg_val")} == {0}
    for name, count in (("cityscapes_fine_panoptic_val", 19), ("coco_2017_val_panoptic", 133), ("coco_2017_val", 80)):
        assert len(check_stored(dataset_classes(name), name)) == count


def test_a_dataset_that_nobody_registered_has_none():
    assert dataset_classes("no_such_set") == []


def test_another_order_is_another_meaning():
    check_same_classes([CAR, SKY], [CAR, SKY], "a", "b")
    with pytest.raises(ValueError, match=r"a has the classes \['car', 'sky'\] in this order, b has \['sky', 'car'\]"):
        check_same_classes([CAR, SKY], [SKY, CAR], "a", "b")
    with pytest.raises(ValueError, match="categories of b are not those of a"):
        check_same_classes([CAR, SKY], [CAR, {**SKY, "isthing": 1}], "a", "b")


@pytest.mark.parametrize(
    "classes",
    [
        {"a": 1},
        [],
        "car",
        [CAR, "sky"],
        [CAR, CAR],
        [{**CAR, "id": "7"}],
        [{**CAR, "id": True}],
        [{**CAR, "isthing": 2}],
        [{**CAR, "name": None}],
        [{**CAR, "color": [1, 2]}],
        [{**CAR, "color": [1, 2, 300]}],
        [{"id": 7, "name": "car"}],
    ],
)
def test_what_are_no_classes_is_refused_naming_the_file(classes):
    with pytest.raises(ValueError, match="x.pth.*`classes`"):
        check_stored(classes, "x.pth")
