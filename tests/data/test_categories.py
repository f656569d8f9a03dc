"""Categories of two datasets: the same in any order, or refused with both lists."""

import pytest
from detectron2.data import MetadataCatalog

from eco_m2f.data.categories import check_same_categories, in_order_of, registered_categories, same_categories

CAR, SKY, DOG = (
    {"id": 7, "name": "car", "isthing": 1},
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 90, "name": "dog", "isthing": 1},
)


def test_the_order_is_free():
    check_same_categories([CAR, SKY, DOG], [DOG, CAR, SKY], "train", "val")
    assert in_order_of([CAR, SKY, DOG], [DOG, {**CAR, "color": [1, 2, 3]}, SKY])[0] == {**CAR, "color": [1, 2, 3]}
    assert in_order_of([CAR, SKY], [DOG, CAR, SKY]) == [DOG, CAR, SKY]


@pytest.mark.parametrize(
    "other, expected",
    [
        ([CAR, SKY], r"it lacks \[90 dog \(thing\)\] and adds none"),
        ([CAR, SKY, DOG, {**DOG, "id": 91}], r"adds \[91 dog"),
        ([CAR, SKY, {**DOG, "name": "cat"}], r"90 dog.*90 cat"),
        ([CAR, {**SKY, "isthing": 1}, DOG], r"3 sky \(stuff\).*3 sky \(thing\)"),
        ([{**CAR, "id": 3}, {**SKY, "id": 7}, DOG], "7 car.*3 car"),
        ([], "has none"),
    ],
)
def test_others_are_refused_with_both_lists(other, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        check_same_categories([CAR, SKY, DOG], other, "the training set 'a'", "dataset 'b'")
    assert "the training set 'a' has [7 car (thing), 3 sky (stuff), 90 dog (thing)]" in str(caught.value)


def test_isthing_counts_where_both_have_it():
    boxes = [{"id": c["id"], "name": c["name"]} for c in (CAR, DOG)]
    assert same_categories([CAR, DOG], boxes) and same_categories(boxes, [CAR, DOG])


def test_what_metadata_say():
    coco = registered_categories(MetadataCatalog.get("coco_2017_val_panoptic"))
    assert len(coco) == 133 and coco[0] == {"id": 1, "name": "person", "isthing": 1}
    assert coco[132] == {"id": 200, "name": "rug-merged", "isthing": 0}
    cityscapes = registered_categories(MetadataCatalog.get("cityscapes_fine_panoptic_val"))
    assert cityscapes[13] == {"id": 26, "name": "car", "isthing": 1} and len(cityscapes) == 19
    boxes = registered_categories(MetadataCatalog.get("coco_2017_val"))
    assert len(boxes) == 80 and boxes[-1] == {"id": 90, "name": "toothbrush"}
    ade = registered_categories(MetadataCatalog.get("ade20k_sem_seg_val"))
    assert len(ade) == 150 and ade[0]["id"] == 0
