"""The message names what is missing of a dataset, for every official name."""

import pytest

from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.images import DataError
from eco_m2f.data.present import check_present, loading

OFFICIAL = {
    "coco_2017_train_panoptic": "panoptic_train2017.json",
    "coco_2017_val_panoptic_with_sem_seg": "panoptic_val2017.json",
    "coco_2017_train": "instances_train2017.json",
    "cityscapes_fine_panoptic_train": "cityscapes_panoptic_train.json",
    "cityscapes_fine_sem_seg_val": "val",
    "ade20k_sem_seg_train": "training",
    "toy_panoptic_train": "panoptic_train.json",
    "toy_detection_val": "detection_val.json",
    "nuclei_panoptic_test": "panoptic_test.json",
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_without_its_files_a_dataset_is_not_complete(name, monkeypatch):
    monkeypatch.setattr("os.path.exists", lambda path: False)
    with pytest.raises(DataError, match=f"{name}.*{OFFICIAL[name]} does not exist.*datasets/README.md.*DETECTRON2"):
        check_present(name)


def test_a_folder_that_is_missing_is_named(tree, forget):
    register_from_config([f"name=own,{tree.spec}"])
    check_present("own")
    (tree.base / "panoptic").rename(tree.base / "elsewhere")
    with pytest.raises(DataError, match=f"{tree.base / 'panoptic'} does not exist"):
        check_present("own")


def test_an_assertion_of_a_loader_becomes_a_message():
    with pytest.raises(DataError, match="'a' cannot be loaded: No annotations found in x.*README"):
        with loading("a"):
            raise AssertionError("No annotations found in x")
