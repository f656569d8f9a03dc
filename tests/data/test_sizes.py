"""Sizes of images that the records leave out: from the JSON, or from the files, of which only the header is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from eco_m2f.data.loader import build_train_loader
from eco_m2f.data.sizes import add_known_sizes, are_wide, header_size, json_sizes

SIZES = {1: (40, 60), 2: (60, 40), 3: (50, 50)}  # height, width


@pytest.mark.parametrize("info", [{}, {"images": ["another thing"]}])
def test_sizes_come_from_the_images_of_the_json(tmp_path, info):
    """Also where a part that is no dataset's uses the same word as a key."""
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in SIZES.items()]
    content = {"info": info, "annotations": [{"segments_info": [{"images": 3}]}], "images": images, "categories": []}
    (tmp_path / "pan.json").write_text(json.dumps(content, indent=1))
    assert json_sizes(tmp_path / "pan.json") == SIZES


@pytest.mark.parametrize("image", [{"id": 1}, {"id": 1, "height": "40", "width": 60}, {"height": 4, "width": 6}, 7])
def test_entries_that_do_not_tell_are_left_out(tmp_path, image):
    (tmp_path / "pan.json").write_text(json.dumps({"images": [image, {"id": "b", "height": 5, "width": 6}]}))
    assert json_sizes(tmp_path / "pan.json") == {"b": (5, 6)}


@pytest.mark.parametrize("text", ["", "[]", '{"images": [1', '{"annotations": []}'])
def test_an_unusable_json_tells_nothing(tmp_path, text):
    (tmp_path / "pan.json").write_text(text)
    assert json_sizes(tmp_path / "pan.json") == json_sizes(tmp_path / "none.json") == {}


def test_a_header_tells_the_size_of_the_picture_as_it_is_shown(tmp_path):
    picture = Image.new("RGB", (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name, options in {"a.png": {}, "b.jpg": {}, "c.jpg": {"exif": exif}, "d.png": {"exif": exif}}.items():
        picture.save(tmp_path / name, **options)
        assert header_size(tmp_path / name) == ((60, 40) if options else (40, 60)), name


def test_nothing_is_decoded_and_nothing_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])  # a header and half the pixels
    (tmp_path / "b.jpg").write_bytes(b"no image")
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "none.jpg")]
    assert [header_size(f) for f in files] == [(40, 60), (0, 0), (0, 0)]
    assert are_wide([{"file_name": str(f)} for f in files]) == [True, False, False]


@pytest.fixture
def without_sizes(tree, forget):
    """Two panoptic datasets with the same image ids, whose loaders leave sizes out, as detectron2's of COCO do."""
    for name, ids in (("first", (1, 2)), ("second", (2, 1))):
        folder = tree.base / name
        images = [{"id": i, "height": (40, 50)[j], "width": (60, 30)[j]} for j, i in enumerate(ids)]
        folder.mkdir()
        (folder / "pan.json").write_text(json.dumps({"images": images}))
        records = [
            {
                "file_name": str(tree.image(j + 1)),
                "image_id": i,
                "pan_seg_file_name": str(folder / f"{j + 1}.png"),
                "segments_info": [{"id": 300, "category_id": 0}, {"id": 70000, "category_id": 0, "iscrowd": j}]
                + [{"id": 9, "category_id": 1}],
            }
            for j, i in enumerate(ids)
        ]
        for j in (1, 2):
            (folder / f"{j}.png").write_bytes(tree.panoptic(j).read_bytes())
        DatasetCatalog.register(name, lambda records=records: [dict(r) for r in records])
        MetadataCatalog.get(name).set(panoptic_json=str(folder / "pan.json"), panoptic_root=str(folder))
    return ("first", "second")


def test_the_records_of_several_datasets_get_their_own_sizes(without_sizes):
    records = [r for name in without_sizes for r in DatasetCatalog.get(name)]
    add_known_sizes(records, without_sizes)
    assert [(r["height"], r["width"]) for r in records] == [(40, 60), (50, 30)] * 2


@pytest.mark.parametrize("readable", [True, False])
def test_batches_are_grouped_where_records_have_no_sizes(without_sizes, cfg, readable):
    """By the JSON; where that does not help, by the headers of the images."""
    if not readable:
        for name in without_sizes:
            Path(MetadataCatalog.get(name).panoptic_json).unlink()
    cfg.DATASETS.TRAIN = without_sizes
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    loader = build_train_loader(cfg, seed=0)
    assert loader.batch_sampler.groups.tolist() == [1, 0, 1, 0]
    first = next(iter(loader))
    assert len({x["width"] > x["height"] for x in first}) == 1


def test_a_json_that_states_another_size_than_the_image_has_is_refused(without_sizes, cfg):
    path = MetadataCatalog.get("first").panoptic_json
    with open(path, "w") as file:
        json.dump({"images": [{"id": i, "height": 77, "width": 99} for i in (1, 2)]}, file)
    cfg.DATASETS.TRAIN = ("first",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    with pytest.raises(ValueError, match="99"):
        next(iter(build_train_loader(cfg, seed=0)))
