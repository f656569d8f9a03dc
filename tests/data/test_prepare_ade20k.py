"""ADE20K: class maps from the official annotation, and the loaders that read them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from PIL import Image

from eco_m2f.data.check import check_class_count
from eco_m2f.data.mappers import PanopticTestMapper, build_train_mapper
from eco_m2f.data.panoptic_map import DataError, read_classes
from eco_m2f.evaluation.build import evaluators_for

LABELS = np.array([[0, 1, 150], [7, 0, 33]], dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)


@pytest.fixture(scope="module")
def ade20k(script):
    return script("datasets/prepare_ade20k_semantic")


@pytest.fixture
def root(tmp_path) -> Path:
    """A generated ADEChallengeData2016: two images for training, one for validation."""
    base = tmp_path / "ADEChallengeData2016"
    for split, stem, count in (("training", "ADE_train", 2), ("validation", "ADE_val", 1)):
        for folder in ("images", "annotations"):
            (base / folder / split).mkdir(parents=True)
        for i in range(1, count + 1):
            Image.new("RGB", (60, 40), (9, 99, 199)).save(base / "images" / split / f"{stem}_{i:08d}.jpg")
            Image.fromarray(np.roll(LABELS, i, axis=1)).save(base / "annotations" / split / f"{stem}_{i:08d}.png")
    return base


@pytest.mark.parametrize("workers", [1, 2])
def test_labels_become_classes(ade20k, root, workers):
    assert ade20k.prepare(root, "training", workers)
    found = read_classes(root / "annotations_detectron2" / "training" / "ADE_train_00000002.png")
    table = {0: 255, 1: 0, 150: 149, 7: 6, 33: 32}
    np.testing.assert_array_equal(found, np.vectorize(table.get)(np.roll(LABELS, 2, axis=1)))


def test_a_second_run_does_nothing(ade20k, root):
    assert ade20k.prepare(root, "validation")
    assert not ade20k.prepare(root, "validation")
    output = root / "annotations_detectron2" / "validation"
    (output / "other.png").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        ade20k.prepare(root, "validation")
    assert ade20k.prepare(root, "validation", overwrite=True)
    assert [p.name for p in output.iterdir()] == ["ADE_val_00000001.png"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: Image.fromarray(LABELS + np.uint8(1)).save(f), "label 151 is above 150"),
        (lambda f: f.write_bytes(b"no image"), "cannot be read"),
        (lambda f: f.unlink(), "no PNG found; unpack ADEChallengeData2016.zip"),
        (lambda f: f.rename(f.with_name("ADE_val_9.png")), "ADE_val_9.png: its image is not in"),
    ],
)
def test_a_spoiled_split_leaves_nothing_behind(ade20k, root, spoil, message):
    spoil(root / "annotations" / "validation" / "ADE_val_00000001.png")
    with pytest.raises(DataError, match=message):
        ade20k.prepare(root, "validation")
    assert not list(root.glob("annotations_detectron2/*"))


@pytest.mark.parametrize("name, split", [("train", "training"), ("val", "validation")])
def test_class_maps_lie_where_the_registered_dataset_has_them(name, split):
    meta = MetadataCatalog.get(f"ade20k_sem_seg_{name}")
    assert Path(meta.sem_seg_root).parts[-3:] == ("ADEChallengeData2016", "annotations_detectron2", split)
    assert Path(meta.image_root).parts[-3:] == ("ADEChallengeData2016", "images", split)
    check_class_count(f"ade20k_sem_seg_{name}", 150)
    with pytest.raises(ValueError, match="has 150 categories"):
        check_class_count(f"ade20k_sem_seg_{name}", 151)


def test_a_perfect_prediction_of_the_generated_tree_scores_100(ade20k, root, cfg, forget):
    """The sets are loaded like detectron2's registered ones, mapped for training and evaluation, and evaluated."""
    for split in ("training", "validation"):
        ade20k.prepare(root, split)
    folders = root / "annotations_detectron2" / "training", root / "images" / "training"
    DatasetCatalog.register("generated", lambda: load_sem_seg(*map(str, folders), image_ext="jpg"))
    official = MetadataCatalog.get("ade20k_sem_seg_val")
    MetadataCatalog.get("generated").set(
        stuff_classes=official.stuff_classes, evaluator_type=official.evaluator_type, ignore_label=255
    )
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "mask_former_semantic", 150
    cfg.INPUT.MIN_SIZE_TEST = 20
    train, test = build_train_mapper(cfg), PanopticTestMapper(cfg)
    evaluator = evaluators_for("generated")
    evaluator.reset()
    for record in DatasetCatalog.get("generated"):
        assert set(train(record)["sem_seg"].unique().tolist()) == {0, 6, 32, 149, 255}
        x = test(record)
        assert x["image"].shape == (3, 20, 30) and (x["height"], x["width"]) == (40, 60)
        truth = torch.from_numpy(read_classes(x["sem_seg_file_name"]).astype(np.int64))
        scores = torch.nn.functional.one_hot(truth.clamp(max=149), 150).movedim(-1, 0)
        evaluator.process([x], [{"sem_seg": scores}])
    results = evaluator.evaluate()
    assert set(results) == {"sem_seg"} and results["sem_seg"]["mIoU"] == 100.0
    assert len([k for k in results["sem_seg"] if k.startswith("IoU-")]) == 150
