"""Nuclei: conversion of real and generated raw images, the split, and errors for a faulty raw folder."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from eco_m2f.data.panoptic_map import DataError, read_ids

HEADER = ["image_id", "width", "height", "num_nuclei"]


@pytest.fixture(scope="module")
def nuclei(script):
    return script("datasets/prepare_nuclei")


def _write_index(raw, rows):
    with (raw / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def raw(tmp_path):
    """Four generated images. Nuclei cover image d completely."""
    base, rows = tmp_path / "raw", []
    for folder in ("images", "instance_ids"):
        (base / folder).mkdir(parents=True)
    for i, name in enumerate("abcd"):
        ids = np.zeros((20, 24 + i), dtype=np.uint16)
        ids[2:8, 3:9], ids[10:15, 4:20] = 1, 2
        ids[ids == 0] = 3 if name == "d" else 0
        Image.fromarray(ids).save(base / "instance_ids" / f"{name}.png")
        Image.new("RGB", ids.shape[::-1], (i, 2, 3)).save(base / "images" / f"{name}.png")
        rows.append({"image_id": name, "width": 24 + i, "height": 20, "num_nuclei": 3 if name == "d" else 2})
    _write_index(base, rows)
    return base


def _annotations(output) -> dict[str, dict]:
    """{file name: annotation with its split}."""
    found = {}
    for split in ("train", "val", "test"):
        content = json.loads((output / "annotations" / f"panoptic_{split}.json").read_text())
        found |= {a["file_name"]: {**a, "split": split} for a in content["annotations"]}
    return found


def test_conversion(nuclei, raw, tmp_path):
    assert nuclei.prepare(raw, tmp_path / "out")
    annotations = _annotations(tmp_path / "out")
    assert Counter(a["split"] for a in annotations.values()) == {"train": 2, "val": 1, "test": 1}
    assert sorted(a["image_id"] for a in annotations.values()) == [0, 1, 2, 3]
    for name, annotation in annotations.items():
        source = np.asarray(Image.open(raw / "instance_ids" / name)).astype(int)
        ids = read_ids(tmp_path / "out" / f"panoptic_{annotation['split']}" / name)
        np.testing.assert_array_equal(np.where(ids == 1 << 16, 0, ids), source)
        segments = [(s["id"], s["category_id"]) for s in annotation["segments_info"]]
        assert segments == ([(1, 1), (2, 1), (3, 1)] if name == "d.png" else [(1, 1), (2, 1), (1 << 16, 2)])
        copied = (tmp_path / "out" / annotation["split"] / name).read_bytes()
        assert copied == (raw / "images" / name).read_bytes()


def test_real_images(nuclei, shared, tmp_path):
    """Five real images have the nuclei of the index and a segment at every pixel. The checker finds nothing."""
    source, raw = shared / "data" / "nuclei", tmp_path / "raw"
    with (source / "index.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda r: int(r["width"]) * int(r["height"]))[::150]
    for folder in ("images", "instance_ids"):
        (raw / folder).mkdir(parents=True)
        for row in rows:
            shutil.copy(source / folder / f"{row['image_id']}.png", raw / folder)
    _write_index(raw, rows)
    nuclei.prepare(raw, tmp_path / "out")
    annotations = _annotations(tmp_path / "out")
    assert len(annotations) == len(rows) == 5
    for row in rows:
        segments = annotations[f"{row['image_id']}.png"]["segments_info"]
        assert sum(s["category_id"] == 1 for s in segments) == int(row["num_nuclei"])
        assert sum(s["area"] for s in segments) == int(row["width"]) * int(row["height"])


def test_the_split_of_all_664(nuclei, shared):
    """530 / 67 / 67 images, disjoint and always the same. Every common size has its share."""
    with (shared / "data" / "nuclei" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    splits = nuclei.split_rows(rows, seed=0)
    assert {k: len(v) for k, v in splits.items()} == {"train": 530, "val": 67, "test": 67}
    names = {split: [r["image_id"] for r in chosen] for split, chosen in splits.items()}
    assert len(set(sum(names.values(), []))) == 664
    again = nuclei.split_rows(list(reversed(rows)), seed=0)
    assert names == {split: [r["image_id"] for r in chosen] for split, chosen in again.items()}
    assert names["val"] != [r["image_id"] for r in nuclei.split_rows(rows, seed=1)["val"]]
    sizes = {split: Counter((r["width"], r["height"]) for r in chosen) for split, chosen in splits.items()}
    for size, count in Counter((r["width"], r["height"]) for r in rows).items():
        for held_out in ("val", "test"):
            assert abs(sizes[held_out][size] - count * 67 / 664) <= 1


def test_a_second_run_does_nothing(nuclei, raw, tmp_path):
    assert nuclei.prepare(raw, tmp_path / "out") and not nuclei.prepare(raw, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        nuclei.prepare(raw, tmp_path / "out", seed=1)


def _index(raw, **change):
    rows = list(csv.DictReader((raw / "index.csv").open()))
    rows[1].update(change)
    _write_index(raw, rows)


SPOILED = {
    "no index": (lambda r: (r / "index.csv").unlink(), "index.csv not found"),
    "short index": (lambda r: (r / "index.csv").write_text(",".join(HEADER) + "\na,24,20,2\n"), "lists 1 image"),
    "other columns": (lambda r: (r / "index.csv").write_text("name\na\nb\nc\n"), "lacks the column.*image_id"),
    "listed twice": (lambda r: _index(r, image_id="a"), "lists image a twice"),
    "missing file": (lambda r: (r / "instance_ids" / "b.png").unlink(), "missing: .*b.png .1 in all"),
    "other size": (lambda r: _index(r, width=99), "sizes differ"),
    "other count": (lambda r: _index(r, num_nuclei=7), "b.png: 2 nuclei drawn, index.csv says 7"),
    "broken file": (lambda r: (r / "images" / "b.png").write_text("x"), "b.png: image cannot be read"),
    "grey image": (lambda r: Image.new("L", (25, 20)).save(r / "images" / "b.png"), "expected an RGB image"),
    "color ids": (lambda r: Image.new("RGB", (25, 20)).save(r / "instance_ids" / "b.png"), "one 16-bit channel"),
}


@pytest.mark.parametrize("case", sorted(SPOILED))
def test_spoiled_input_is_refused_and_nothing_is_written(nuclei, raw, tmp_path, case):
    spoil, message = SPOILED[case]
    spoil(raw)
    with pytest.raises(DataError, match=message):
        nuclei.prepare(raw, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
