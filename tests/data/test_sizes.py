"""Which images are wide: from their records, or from the headers of their files."""

import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.images import header_size
from eco_m2f.data.loader import build_train_loader
from eco_m2f.data.sizes import are_wide


def test_a_header_tells_the_size_of_the_picture_as_it_is_shown(tmp_path):
    picture = Image.new("RGB", (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
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


@pytest.mark.parametrize(
    "spoil",
    [
        os.mkfifo,
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 60\n"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
    ],
)
def test_a_header_is_sought_in_regular_files_of_the_formats_alone(tmp_path, spoil):
    spoil(tmp_path / "a.png")
    assert header_size(tmp_path / "a.png") == (0, 0)


@pytest.mark.parametrize("known", [True, False])
def test_batches_are_grouped_by_records_or_by_headers(tree, forget, cfg, known):
    if not known:
        for image in tree.content["images"]:
            del image["height"], image["width"]
    tree.save()
    cfg.DATASETS.TRAIN = register_from_config([f"name=sized,{tree.spec}"])
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    assert ["width" in record for record in DatasetCatalog.get("sized")] == [known] * 2
    loader = build_train_loader(cfg, seed=0)
    assert loader.batch_sampler.groups.tolist() == [1, 0]
    first = next(iter(loader))
    assert len({x["width"] > x["height"] for x in first}) == 1


def test_records_that_another_loader_made_without_sizes_are_grouped_too(tree, forget, cfg):
    """detectron2's loaders of panoptic sets make such records."""
    kept = ("file_name", "image_id", "pan_seg_file_name", "segments_info")
    register_from_config([f"name=sized,{tree.spec}"])
    records = [{key: record[key] for key in kept} for record in DatasetCatalog.get("sized")]
    DatasetCatalog.register("theirs", lambda: [dict(record) for record in records])
    cfg.DATASETS.TRAIN = ("theirs", "theirs")
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    loader = build_train_loader(cfg, seed=0)
    assert loader.batch_sampler.groups.tolist() == [1, 0, 1, 0]
    first = next(iter(loader))
    assert len({x["width"] > x["height"] for x in first}) == 1


def test_a_json_that_states_another_size_than_the_image_has_is_refused(tree, forget, cfg):
    for image in tree.content["images"]:
        image["height"], image["width"] = 77, 99
    tree.save()
    cfg.DATASETS.TRAIN = register_from_config([f"name=sized,{tree.spec}"])
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    with pytest.raises(ValueError, match="99"):
        next(iter(build_train_loader(cfg, seed=0)))
