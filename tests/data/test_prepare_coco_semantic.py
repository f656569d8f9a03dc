"""Class maps from panoptic annotation."""

import numpy as np
import pytest
from PIL import Image

from eco_m2f.data.panoptic_map import DataError, read_ids


@pytest.fixture(scope="module")
def semantic(script):
    return script("datasets/prepare_coco_semantic")


@pytest.mark.parametrize("workers", [1, 2])
def test_each_pixel_gets_its_contiguous_class(semantic, tree, workers):
    """Crowds have their class, and void is 255."""
    output = tree.base / "semseg"
    assert semantic.prepare(tree.json, tree.base / "panoptic", output, workers)
    for i, classes in ((1, {300: 0, 70000: 2, 9: 1, 0: 255}), (2, {300: 0, 70000: 0, 9: 1, 0: 255})):
        got, ids = np.asarray(Image.open(output / f"{i}.png")), read_ids(tree.panoptic(i))
        assert got.dtype == np.uint8 and got.shape == ids.shape
        np.testing.assert_array_equal(got, np.vectorize(classes.get)(ids))


def test_a_second_run_does_nothing(semantic, tree):
    output = tree.base / "semseg"
    assert semantic.prepare(tree.json, tree.base / "panoptic", output)
    assert not semantic.prepare(tree.json, tree.base / "panoptic", output)
    (output / "1.png").unlink()
    with pytest.raises(FileExistsError, match="--overwrite"):
        semantic.prepare(tree.json, tree.base / "panoptic", output)
    assert semantic.prepare(tree.json, tree.base / "panoptic", output, overwrite=True)
    assert (output / "1.png").is_file()


def test_a_missing_png_leaves_nothing_behind(semantic, tree):
    tree.panoptic(2).unlink()
    with pytest.raises(DataError, match="2.png: panoptic PNG not found"):
        semantic.prepare(tree.json, tree.base / "panoptic", tree.base / "semseg")
    assert sorted(p.name for p in tree.base.iterdir()) == ["images", "pan.json", "panoptic"]


def test_an_undeclared_category_is_named(semantic):
    with pytest.raises(DataError, match=r"x.png: category_id \[5\]"):
        semantic.class_map(np.ones((2, 2), np.int32), [{"id": 1, "category_id": 5}], {3: 0}, "x.png")
