"""Mappers: the output for known images, and that image and masks move together."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image
from scipy import ndimage

from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.mappers import MAPPERS, PanopticTestMapper, build_train_mapper
from eco_m2f.data.panoptic_map import DataError, ids_to_rgb, read_ids


@pytest.fixture
def records(tree, forget):
    register_from_config([f"name=own,{tree.spec}"])
    return DatasetCatalog.get("own")


def _same(mask: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether a padded mask has the expected one at its upper left and nothing else."""
    height, width = expected.shape
    return bool((mask[:height, :width].numpy() == expected).all()) and int(mask.sum()) == int(expected.sum())


def test_masks_are_id_equality_and_padding_is_void(records, cfg):
    cfg.INPUT.IMAGE_SIZE = 60
    output = build_train_mapper(cfg)(records[0])
    ids = read_ids(records[0]["pan_seg_file_name"])
    instances = output["instances"]
    assert instances.image_size == (60, 60) and instances.gt_masks.shape == (3, 60, 60)
    assert instances.gt_masks.dtype == torch.bool and instances.gt_classes.dtype == torch.int64
    assert instances.gt_classes.tolist() == [0, 2, 1]  # contiguous, in the order of the JSON
    for mask, segment in zip(instances.gt_masks, (300, 70000, 9), strict=True):
        assert _same(mask, ids == segment)
    assert output["image"].dtype == torch.uint8 and output["image"].shape == (3, 60, 60)
    assert (output["image"][:, 40:] == 128).all()
    np.testing.assert_array_equal(output["image"][:, :40].numpy().transpose(1, 2, 0), ids_to_rgb(ids))
    assert (output["height"], output["width"], output["image_id"]) == (40, 60, 1)


def test_crowds_are_dropped(records, cfg):
    cfg.INPUT.IMAGE_SIZE = 50
    instances = build_train_mapper(cfg)(records[1])["instances"]
    assert instances.gt_classes.tolist() == [0, 1]
    crowd = read_ids(records[1]["pan_seg_file_name"]) == 70000
    assert not (instances.gt_masks[:, :50, :30].numpy() & crowd).any()


def test_an_image_of_crowds_gives_no_instances(records, cfg):
    cfg.INPUT.IMAGE_SIZE = 60
    for segment in records[0]["segments_info"]:
        segment["iscrowd"] = 1
    instances = build_train_mapper(cfg)(records[0])["instances"]
    assert instances.gt_masks.shape == (0, 60, 60) and instances.gt_classes.shape == (0,)


def test_horizontal_flip_mirrors_image_and_masks(records, cfg):
    cfg.INPUT.IMAGE_SIZE = 60
    plain = build_train_mapper(cfg)(records[0])
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    mapper, seen = build_train_mapper(cfg), set()
    for seed in range(12):
        np.random.seed(seed)
        output = mapper(records[0])
        mirrored = not torch.equal(output["image"], plain["image"])
        seen.add(mirrored)
        for got, expected in (
            (output["image"], plain["image"]),
            (output["instances"].gt_masks, plain["instances"].gt_masks),
        ):
            assert torch.equal(got, expected.flip(-1) if mirrored else expected)
    assert seen == {True, False}


def _assert_aligned(output: dict, segments: list[dict]) -> None:
    """The image's colour is its segment's id, so each mask has only one colour, except at its border."""
    image, instances = output["image"].numpy(), output["instances"]
    colors = {ids_to_rgb(np.array([[s["id"]]]))[0, 0].tobytes(): s["category_id"] for s in segments}
    assert len(instances) and instances.gt_masks.flatten(1).any(1).all()  # vanished segments are gone
    assert int(instances.gt_masks.sum(0).max()) == 1
    for mask, category in zip(instances.gt_masks.numpy(), instances.gt_classes.tolist(), strict=True):
        inner = ndimage.binary_erosion(mask, iterations=6)
        for color in np.unique(image[:, inner], axis=1).T:
            assert colors[color.tobytes()] == category
    grey = (image == 128).all(0)
    assert not (instances.gt_masks.any(0).numpy() & ndimage.binary_erosion(grey, iterations=3)).any()


def test_jittered_scale_keeps_image_and_masks_aligned(records, cfg):
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.IMAGE_SIZE = "horizontal", 64
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 0.3, 4.0
    mapper, counts = build_train_mapper(cfg), set()
    for seed in range(25):
        np.random.seed(seed)
        output = mapper(records[0])
        assert output["image"].shape == (3, 64, 64) and output["instances"].gt_masks.shape[1:] == (64, 64)
        _assert_aligned(output, records[0]["segments_info"])
        counts.add(len(output["instances"]))
    assert len(counts) > 1  # some crops lost a segment


def test_maskformer_mapper_resizes_and_crops(records, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (60, 80), "horizontal"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [40, 56]
    mapper = build_train_mapper(cfg)
    for seed in range(10):
        np.random.seed(seed)
        output = mapper(records[0])
        assert output["image"].shape == (3, 40, 56)
        _assert_aligned(output, records[0]["segments_info"])


def test_size_divisibility_pads_to_its_multiple(records, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.SIZE_DIVISIBILITY = "mask_former_panoptic", 32
    output = build_train_mapper(cfg)(records[0])
    assert output["image"].shape == (3, 64, 64)
    assert (output["image"][:, 40:] == 128).all() and (output["image"][:, :, 60:] == 128).all()
    assert output["instances"].image_size == (64, 64)
    assert _same(output["instances"].gt_masks[0], read_ids(records[0]["pan_seg_file_name"]) == 300)


def test_single_category_area_is_respected(records, cfg):
    """The lower half is one class. With a limit of 60 % crops avoid it; void does not count."""
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [10, 12]
    worst = {}
    for limit in (1.0, 0.6):
        cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = limit
        mapper, shares = build_train_mapper(cfg), []
        for seed in range(30):
            np.random.seed(seed)
            masks = mapper(records[0])["instances"].gt_masks
            shares.append(float(masks.flatten(1).sum(1).max() / masks.any(0).sum()))
        worst[limit] = np.mean(np.array(shares) > 0.6)
    assert worst[0.6] < worst[1.0] / 2


def test_color_augmentation_changes_colors_only(records, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    plain = build_train_mapper(cfg)(records[0])
    cfg.INPUT.COLOR_AUG_SSD = True
    mapper, changed = build_train_mapper(cfg), 0
    for seed in range(8):
        np.random.seed(seed)
        output = mapper(records[0])
        assert torch.equal(output["instances"].gt_masks, plain["instances"].gt_masks)
        changed += not torch.equal(output["image"], plain["image"])
    assert changed >= 5


def test_many_segments(tree, forget, cfg):
    """There are more segments than one byte can number."""
    ids = (np.arange(1, 401, dtype=np.int32) * 37).reshape(20, 20).repeat(2, 0).repeat(2, 1)
    tree.add(3, ids, {int(i): 7 for i in np.unique(ids)})
    register_from_config([f"name=many,{tree.save().spec}"])
    cfg.INPUT.IMAGE_SIZE = 48
    instances = build_train_mapper(cfg)(DatasetCatalog.get("many")[2])["instances"]
    assert len(instances) == 400 and int(instances.gt_masks.sum()) == 48 * 48


def test_the_mapper_leaves_its_input_alone(records, cfg):
    before = repr(records[0])
    build_train_mapper(cfg)(records[0])
    output = PanopticTestMapper(cfg)(records[0])
    output["segments_info"][0]["category_id"] = 99
    assert repr(records[0]) == before


def test_test_mapper_keeps_the_ground_truth(records, cfg):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 100
    output = PanopticTestMapper(cfg)(records[0])
    assert output["image"].shape == (3, 67, 100) and output["image"].dtype == torch.uint8
    for key in ("file_name", "image_id", "height", "width", "pan_seg_file_name", "segments_info"):
        assert output[key] == records[0][key]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_an_image_from_memory_equals_the_same_from_a_file(records, cfg, image_format):
    cfg.INPUT.FORMAT = image_format
    mapper = PanopticTestMapper(cfg)
    rgb = np.asarray(Image.open(records[0]["file_name"]))
    assert torch.equal(mapper.to_tensor(rgb), mapper(records[0])["image"])
    with pytest.raises(ValueError, match="float64"):
        mapper.to_tensor(rgb.astype(float))


def test_coco_sample(shared, forget, cfg):
    """Two real COCO images have 18 and 32 segments. Except for crowds, every mask has the area in the JSON."""
    base = shared / "data" / "coco_panoptic_sample" / "sample_data"
    spec = (
        f"images={base / 'input_images'},panoptic={base / 'panoptic_examples'},json={base / 'panoptic_examples.json'}"
    )
    register_from_config([f"name=sample,{spec}"])
    cfg.INPUT.IMAGE_SIZE = 640
    mapper, records = build_train_mapper(cfg), DatasetCatalog.get("sample")
    assert [len(r["segments_info"]) for r in records] == [18, 32]
    listed = json.loads((base / "panoptic_examples.json").read_text())["annotations"]
    areas = {(a["image_id"], s["id"]): s["area"] for a in listed for s in a["segments_info"]}
    for record in records:
        kept = [s for s in record["segments_info"] if not s["iscrowd"]]
        instances = mapper(record)["instances"]
        assert instances.gt_classes.tolist() == [s["category_id"] for s in kept]
        assert instances.gt_masks.flatten(1).sum(1).tolist() == [areas[record["image_id"], s["id"]] for s in kept]


def test_unknown_mapper_name_lists_the_known(cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    with pytest.raises(ValueError, match="'mask_former_instance'.*coco_panoptic_lsj"):
        build_train_mapper(cfg)


@pytest.mark.parametrize("name", sorted(MAPPERS))
def test_train_mappers_refuse_to_evaluate(cfg, name):
    with pytest.raises(ValueError, match="training only"):
        MAPPERS[name](cfg, False)
    with pytest.raises(ValueError, match="evaluation only"):
        PanopticTestMapper(cfg, True)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def _resize_png(path):
    Image.new("RGB", (7, 5)).save(path)


BAD = {
    "missing image": (lambda t: t.image(1).unlink(), "image", "image not found"),
    "broken image": (lambda t: _truncate(t.image(1)), "image", "image cannot be read"),
    "text as image": (lambda t: t.image(1).write_text("no image"), "image", "image cannot be read"),
    "image of another size": (
        lambda t: _resize_png(t.image(1)),
        "image",
        "7x5 pixels, but its annotation says width 60 and height 40",
    ),
    "missing PNG": (lambda t: t.panoptic(1).unlink(), "panoptic", "panoptic PNG not found"),
    "broken PNG": (lambda t: _truncate(t.panoptic(1)), "panoptic", "panoptic PNG cannot be read"),
    "PNG of another size": (lambda t: _resize_png(t.panoptic(1)), "panoptic", "7x5 pixels but its image"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_files_end_in_one_message_naming_the_file(tree, records, cfg, case):
    spoil, which, message = BAD[case]
    spoil(tree)
    with pytest.raises(DataError, match=message) as caught:
        build_train_mapper(cfg)(records[0])
    assert str(getattr(tree, which)(1)) in str(caught.value) and "check_dataset" in str(caught.value)


def test_ids_that_disagree_with_the_png(records, cfg, tree):
    records[0]["segments_info"][0]["id"] = 301
    with pytest.raises(DataError, match="segment id.s. 300") as caught:
        build_train_mapper(cfg)(records[0])
    assert str(tree.panoptic(1)) in str(caught.value)


@pytest.mark.parametrize("mapper", ["train", "test"])
def test_one_pixel_wide_image_is_an_image(tree, forget, cfg, mapper):
    tree.add(3, np.full((50, 1), 4, dtype=np.int32), {4: 7})
    register_from_config([f"name=thin,{tree.save().spec}"])
    mapper = build_train_mapper(cfg) if mapper == "train" else PanopticTestMapper(cfg)
    record = mapper(DatasetCatalog.get("thin")[2])
    assert min(record["image"].shape[1:]) >= 1 and len(record.get("instances", [0])) == 1


def test_a_thin_image_survives_a_small_scale(tree, forget, cfg):
    """At a tenth of the scale, two pixels would round to none."""
    tree.add(3, np.full((200, 2), 4, dtype=np.int32), {4: 7})
    register_from_config([f"name=slim,{tree.save().spec}"])
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 0.1
    cfg.INPUT.IMAGE_SIZE = 64
    instances = build_train_mapper(cfg)(DatasetCatalog.get("slim")[2])["instances"]
    assert instances.gt_masks.flatten(1).sum(1).tolist() == [6]


def test_a_dataset_without_panoptic_annotation_is_refused(records, cfg):
    del records[0]["pan_seg_file_name"]
    with pytest.raises(DataError, match="no panoptic annotation"):
        build_train_mapper(cfg)(records[0])
