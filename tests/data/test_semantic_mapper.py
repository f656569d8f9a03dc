"""The mapper of class maps: from semantic PNGs and from panoptic ones."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.loader import build_train_loader
from eco_m2f.data.mappers import build_train_mapper
from eco_m2f.data.panoptic_map import DataError, read_classes, read_ids


@pytest.fixture
def records(tree, forget):
    register_from_config([f"name=own,{tree.spec}"])
    return DatasetCatalog.get("own")


@pytest.fixture
def semantic_cfg(cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def png_record(tree):
    """A record with only an image and a class map."""
    classes = np.full((40, 60), 255, dtype=np.uint8)
    classes[:10], classes[20:, 30:] = 2, 0
    Image.fromarray(classes).save(tree.base / "classes.png")
    return {"file_name": str(tree.image(1)), "sem_seg_file_name": str(tree.base / "classes.png")}


def test_classes_of_a_png_are_padded_with_void(png_record, semantic_cfg):
    semantic_cfg.INPUT.SIZE_DIVISIBILITY = 32
    output = build_train_mapper(semantic_cfg)(png_record)
    assert output["sem_seg"].shape == (64, 64) and output["sem_seg"].dtype == torch.int64
    expected = read_classes(png_record["sem_seg_file_name"])
    np.testing.assert_array_equal(output["sem_seg"][:40, :60], expected)
    assert (output["sem_seg"][40:] == 255).all() and (output["sem_seg"][:, 60:] == 255).all()
    assert output["image"].shape == (3, 64, 64)
    assert (output["height"], output["width"], output["image_id"]) == (40, 60, png_record["file_name"])


def test_one_instance_per_visible_class(png_record, semantic_cfg):
    output = build_train_mapper(semantic_cfg)(png_record)
    instances = output["instances"]
    assert instances.gt_classes.tolist() == [0, 2] and instances.gt_classes.dtype == torch.int64
    for mask, k in zip(instances.gt_masks, (0, 2), strict=True):
        assert torch.equal(mask, output["sem_seg"] == k)


def test_classes_of_a_panoptic_png_count_crowds(records, semantic_cfg):
    semantic_cfg.INPUT.MIN_SIZE_TRAIN = (30,)  # of the second image, which is 50 x 30
    output = build_train_mapper(semantic_cfg)(records[1])
    ids = read_ids(records[1]["pan_seg_file_name"])
    expected = np.vectorize({300: 0, 70000: 0, 9: 1, 0: 255}.get)(ids)
    np.testing.assert_array_equal(output["sem_seg"], expected)


def test_void_is_the_models_whatever_the_padding_is(png_record, semantic_cfg):
    semantic_cfg.INPUT.SIZE_DIVISIBILITY, semantic_cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 32, 99
    classes = read_classes(png_record["sem_seg_file_name"]).copy()
    classes[classes == 255] = 99
    Image.fromarray(classes).save(png_record["sem_seg_file_name"])
    assert set(build_train_mapper(semantic_cfg)(png_record)["sem_seg"].unique().tolist()) == {0, 2, 99}


def test_map_and_image_move_together(png_record, semantic_cfg):
    """The image has the colours of its classes."""
    classes = read_classes(png_record["sem_seg_file_name"])
    Image.fromarray(np.repeat(classes[..., None] * 100, 3, axis=2).astype(np.uint8)).save(png_record["file_name"])
    semantic_cfg.INPUT.RANDOM_FLIP = "horizontal"
    semantic_cfg.INPUT.CROP.ENABLED, semantic_cfg.INPUT.CROP.TYPE = True, "absolute"
    semantic_cfg.INPUT.CROP.SIZE = [24, 24]
    mapper, seen = build_train_mapper(semantic_cfg), set()
    for seed in range(12):
        np.random.seed(seed)
        output = mapper(png_record)
        assert output["sem_seg"].shape == (24, 24)
        painted = (output["sem_seg"] * 100 % 256).to(torch.uint8)
        assert torch.equal(output["image"], painted.expand(3, -1, -1))
        seen.add(output["sem_seg"].numpy().tobytes())
    assert len(seen) > 3


def spoil_size(record):
    Image.open(record["sem_seg_file_name"]).crop((0, 0, 59, 40)).save(record["sem_seg_file_name"])


def spoil_class(record):
    Image.fromarray(np.full((40, 60), 7, dtype=np.uint8)).save(record["sem_seg_file_name"])


def spoil_mode(record):
    Image.new("RGB", (60, 40)).save(record["sem_seg_file_name"])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_size, "the semantic PNG is 59x40 pixels but its image .* is 60x40"),
        (spoil_class, "class 7 is neither below MODEL.SEM_SEG_HEAD.NUM_CLASSES 3 nor the void value 255"),
        (spoil_mode, "must hold one channel of 8 bits, the class, got mode RGB"),
        (lambda r: r.update(sem_seg_file_name="/none.png"), "/none.png: semantic PNG not found"),
    ],
)
def test_spoiled_maps_are_reported(png_record, semantic_cfg, spoil, message):
    spoil(png_record)
    with pytest.raises(DataError, match=message):
        build_train_mapper(semantic_cfg)(png_record)


@pytest.mark.parametrize("grouped", [True, False])
def test_images_without_known_sizes_are_batched(png_record, semantic_cfg, forget, grouped):
    DatasetCatalog.register("no_sizes", lambda: [dict(png_record)])
    semantic_cfg.DATASETS.TRAIN, semantic_cfg.DATALOADER.NUM_WORKERS = ("no_sizes",), 0
    semantic_cfg.SOLVER.IMS_PER_BATCH = 2
    semantic_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouped
    loader = build_train_loader(semantic_cfg, seed=0)
    assert loader.batch_sampler.groups.tolist() == [int(grouped)]  # 60 x 40 is wide
    batch = next(iter(loader))
    assert [x["sem_seg"].shape for x in batch] == [(40, 60)] * 2
