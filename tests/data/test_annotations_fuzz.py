"""Thousands of damaged JSONs: the readers read them or name the file, and the checker always finishes.

ECO_M2F_FUZZ=10 makes ten times as many.
"""

import copy
import json
import math
import os
import random

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as rle

from eco_m2f.data.check import check_dataset, examine_file
from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.panoptic_map import DataError
from eco_m2f.data.schema import DETECTION, INSTANCES, PANOPTIC
from eco_m2f.data.toy import ToySpec, make_toy_dataset
from eco_m2f.evaluation.boxes import boxes_of
from eco_m2f.quality.average_precision import ObjectComparison
from eco_m2f.quality.ground_truth import BoxGroundTruth, PanopticGroundTruth
from eco_m2f.quality.instance_ground_truth import GivenInstances
from eco_m2f.quality.panoptic_quality import PanopticComparison, image_pq

TRIES = int(150 * float(os.environ.get("ECO_M2F_FUZZ", 1)))  # of each kind of file and of change
VALUES = [
    *(None, True, False, 0, 1, -1, 7, 5.0, 0.5, 2**31, 2**63, 2**70, -(2**70), 1e300, -1e300),
    *("", "0", "1", "x", "../x", "/x", "a\0b", "é" * 3000, "\ud800", "null"),
    *(
        [],
        {},
        [[]],
        [1, 2, 3],
        [0, 0, 5, 5],
        [1, 2, 3, None],
        {"id": 1},
        [{"id": 1}],
        {"size": [48, 48], "counts": "x"},
    ),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    make_toy_dataset(base, ToySpec(num_train=2, num_val=1, size=48))
    return base


def places(value, at=()):
    """The paths of all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def structural(content: dict, rng: random.Random) -> bytes:
    """Replaces, deletes or repeats one to three values."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 3))):
        path = rng.choice(list(places(content)) or [("images",)])
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        how = rng.random()
        if how < 0.2 and path[-1] in (parent if isinstance(parent, dict) else range(len(parent))):
            del parent[path[-1]]
        elif how < 0.3 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(content).encode()


def flipped(content: dict, rng: random.Random) -> bytes:
    """Changes some bytes, or cuts off the end."""
    data = bytearray(json.dumps(content).encode())
    for _ in range(rng.choice((1, 1, 4))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def use_panoptic(name: str) -> None:
    """Reads a panoptic dataset as training and evaluation do."""
    truth = PanopticGroundTruth(name)
    for record in DatasetCatalog.get(name):
        image = truth.image(record["image_id"])
        ids = image.id_map()
        segments = [{k: s[k] for k in ("id", "category_id")} for s in image.segments]
        statistics = PanopticComparison(ids, image.segments).compare(ids, segments)
        assert 0 <= image_pq(statistics) <= 1
        assert {s["category_id"] for s in record["segments_info"]} <= set(range(len(truth.categories)))


def use_boxes(name: str) -> None:
    truth = BoxGroundTruth(name)
    for record in DatasetCatalog.get(name):
        objects = truth.objects(record["image_id"])
        found = [{"category_id": o["category_id"], "bbox": o["bbox"], "score": 0.5} for o in objects]
        assert math.isfinite(ObjectComparison(objects, "bbox").ap(found))
        assert all(np.isfinite(a["bbox"]).all() for a in record["annotations"])
    boxes_of(truth)


def instance_content(toy) -> dict:
    """The toy set's boxes with masks: polygons and both forms of run lengths."""
    content = json.loads((toy / "annotations" / "detection_train.json").read_text())
    for o in content["annotations"]:
        x, y, w, h = o.pop("bbox")
        mask = np.zeros((48, 48), np.uint8)
        mask[y : y + h, x : x + w] = 1
        text = rle.encode(np.asfortranarray(mask))["counts"].decode()
        counts = [48 * x + y, *[h, 48 - h] * (w - 1), h, 48 * 48 - 48 * (x + w - 1) - y - h]
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        o["segmentation"] = ({"size": [48, 48], "counts": text}, {"size": [48, 48], "counts": counts}, polygon)[
            o["id"] % 3
        ]
    return content


@pytest.mark.parametrize("change", [structural, flipped])
def test_spoilt_instance_files_are_taken_or_named(toy, tmp_path, change):
    rng = random.Random(f"instances {change.__name__}")
    content, path, taken = instance_content(toy), tmp_path / "spoilt.json", 0
    for _ in range(TRIES):
        path.write_bytes(change(content, rng))
        examine_file(path, INSTANCES)
        try:
            given = GivenInstances(str(path), content["categories"])
            for o in (o for image in content["images"] for o in given.image(image["id"]).objects((48, 48))):
                assert 0 <= rle.decode(o["segmentation"]).sum() <= 48 * 48
                assert o["area"] <= 2 * 48 * 48
            taken += 1
        except ValueError as error:
            assert "spoilt.json" in str(error)
            str(error).encode()
    assert 0 < taken < TRIES


@pytest.mark.parametrize("change", [structural, flipped])
@pytest.mark.parametrize("kind", [PANOPTIC, DETECTION])
def test_spoilt_files_are_taken_or_named(toy, tmp_path, forget, kind, change):
    rng = random.Random(f"{kind.name} {change.__name__}")
    source = toy / "annotations" / f"{kind.name}_train.json"
    content, path = json.loads(source.read_text()), tmp_path / "spoilt.json"
    data = f"images={toy / 'train'}," + (
        f"panoptic={toy / 'panoptic_train'},json={path}" if kind is PANOPTIC else f"boxes={path}"
    )
    taken = 0
    for i in range(TRIES):
        path.write_bytes(change(content, rng))
        name = f"fuzz_{kind.name}_{change.__name__}_{i}"
        try:
            register_from_config([f"name={name},{data}"])
            (use_panoptic if kind is PANOPTIC else use_boxes)(name)
            taken += 1
        except DataError as error:
            assert "spoilt.json" in str(error) or str(toy) in str(error)
            str(error).encode()  # can be printed
        findings = check_dataset(name) if name in DatasetCatalog.list() else examine_file(path, kind)[1]
        "".join(map(str, findings)).encode()
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)
        else:
            assert findings
    assert 0 < taken < TRIES  # some changes are harmless, most are not
