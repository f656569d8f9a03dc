"""Generated COCO, Cityscapes, nuclei and toy trees in their official places, read through their registered names.

detectron2 reads $DETECTRON2_DATASETS when it is imported, so everything runs in one new process.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from trees import write_all

from eco_m2f.data.annotations import CITYSCAPES, class_map_file, image_file
from eco_m2f.data.schema import Image
from eco_m2f.data.toy import draw_scene

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "coco_2017_train_panoptic": 133,
    "coco_2017_val_panoptic": 133,
    "coco_2017_val_panoptic_with_sem_seg": 133,
    "cityscapes_fine_panoptic_train": 19,
    "cityscapes_fine_panoptic_val": 19,
    "nuclei_panoptic_train": 2,
    "nuclei_panoptic_val": 2,
    "nuclei_panoptic_test": 2,
    "toy_panoptic_train": 9,
    "toy_panoptic_val": 9,
}
PROGRAM = """
import hashlib, json, sys
import numpy as np, torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from detectron2.evaluation import COCOPanopticEvaluator
from eco_m2f.config import add_eco_config
from detectron2.config import get_cfg
from eco_m2f.data.check import check_class_count, check_dataset
from eco_m2f.data.mappers import PanopticTestMapper, build_train_mapper
from eco_m2f.data.panoptic_map import read_ids
from eco_m2f.data.toy import draw_scene
from PIL import Image

def theirs(name):
    # the records of detectron2's own loader for an official name
    meta = MetadataCatalog.get(name)
    load = load_cityscapes_panoptic if "cityscapes" in name else load_coco_panoptic_json
    folders = (meta.image_root, meta.panoptic_root, meta.panoptic_json)
    if "cityscapes" not in name:
        folders = (meta.panoptic_json, meta.image_root, meta.panoptic_root)
    return load(*folders, meta.as_dict())

def alike(ours, theirs):
    # whether our records have everything of detectron2's that is read
    for x, y in zip(ours, theirs, strict=True):
        same = all(x[k] == y[k] for k in y if k != "segments_info")
        kept = [{k: s[k] for k in ("id", "category_id", "iscrowd")} for s in y["segments_info"]]
        if not same or [{k: s[k] for k in kept[0]} for s in x["segments_info"]] != kept:
            return False
    return True

cfg = get_cfg()
add_eco_config(cfg)
cfg.INPUT.FORMAT, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SIZE_TEST = "RGB", 64, 64
cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = "coco_panoptic_lsj", 1.0, 1.0
OFFICIAL = [f"{d}_{s}{e}" for s in ("train", "val") for d, e in
            (("coco_2017", "_panoptic"), ("cityscapes_fine_panoptic", ""))]
results = {}
for name, classes in json.loads(sys.argv[1]).items():
    check_class_count(name, classes)
    evaluator = COCOPanopticEvaluator(name)
    evaluator.reset()
    train, test, counts = build_train_mapper(cfg), PanopticTestMapper(cfg), []
    for record in DatasetCatalog.get(name):
        counts.append(len(train(record)["instances"]))
        inputs = test(record)
        things = set(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.values())
        perfect = [
            {"id": s["id"], "category_id": s["category_id"], "isthing": s["category_id"] in things}
            for s in inputs["segments_info"] if not s["iscrowd"]
        ]
        ids = read_ids(inputs["pan_seg_file_name"])
        ids[~np.isin(ids, [s["id"] for s in perfect])] = 0
        evaluator.process([inputs], [{"panoptic_seg": (torch.from_numpy(ids), perfect)}])
    semantic = [np.unique(np.asarray(Image.open(r["sem_seg_file_name"]))).tolist()
                for r in DatasetCatalog.get(name) if "sem_seg_file_name" in r]
    results[name] = {
        "counts": counts, "pq": evaluator.evaluate()["panoptic_seg"]["PQ"], "semantic": semantic,
        "findings": [str(f) for f in check_dataset(name, classes)],
        "alike": alike(DatasetCatalog.get(name), theirs(name)) if name in OFFICIAL else None,
        "sized": all(r["height"] > 0 and r["width"] > 0 for r in DatasetCatalog.get(name)),
    }
s = draw_scene(64, 1, "val", 2)
results["digest"] = hashlib.sha256(s.image.tobytes() + s.ids.tobytes()).hexdigest()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("datasets")
    write_all(root)
    environment = {**os.environ, "DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(NAMES)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_prediction_scores_100(results, name):
    """The datasets are read by name and mapped. detectron2's panoptic evaluator compares with the ground truth."""
    assert results[name]["pq"] == pytest.approx(100.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_checker_accepts_the_official_layout(results, name):
    assert results[name]["findings"] == []


@pytest.mark.slow
def test_records_of_official_names_equal_detectron2s(results):
    alike = {name: results[name]["alike"] for name in NAMES if results[name]["alike"] is not None}
    assert len(alike) == 4 and all(alike.values()), alike


@pytest.mark.slow
def test_instances_of_the_training_mapper(results):
    """There is one instance per segment, except for crowds."""
    counts = {name: results[name]["counts"] for name in NAMES}
    assert counts["coco_2017_train_panoptic"] == [3, 2, 2, 2] and counts["coco_2017_val_panoptic_with_sem_seg"] == [
        3,
        2,
    ]
    assert counts["cityscapes_fine_panoptic_train"] == [3] * 4 and counts["cityscapes_fine_panoptic_val"] == [3] * 2
    assert counts["nuclei_panoptic_train"] == [3, 3] and counts["nuclei_panoptic_test"] == [3]
    scenes = [draw_scene(64, 0, "val", i) for i in range(2)]
    assert counts["toy_panoptic_val"] == [sum(not s["iscrowd"] for s in scene.segments) for scene in scenes]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_records_have_the_sizes_that_the_json_states(results, name):
    """With the sizes, images are grouped by aspect ratio without reading their files."""
    assert results[name]["sized"]


def test_a_dot_in_the_path_of_cityscapes_is_part_of_it():
    """detectron2's own loader of the panoptic set cuts the path there."""
    metadata = SimpleNamespace(
        evaluator_type=CITYSCAPES, image_root="/a.b/leftImg8bit/train", gt_dir="/a.b/gtFine/train"
    )
    image, annotation = Image(id="aachen_000001_000019", file_name="x"), None
    assert image_file(metadata, image) == "/a.b/leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"
    found = class_map_file(metadata, image, annotation)
    assert found == "/a.b/gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png"


@pytest.mark.slow
def test_semantic_maps_hold_contiguous_classes(results):
    found = results["coco_2017_val_panoptic_with_sem_seg"]["semantic"]
    assert found == [[0, 2, 119, 255], [0, 119, 255]]  # person, car, sky, void
    assert results["cityscapes_fine_panoptic_val"]["semantic"] == [[0, 10, 11, 13, 255]] * 2


@pytest.mark.slow
def test_another_process_draws_the_same_toy_scene(results):
    scene = draw_scene(64, 1, "val", 2)
    assert results["digest"] == hashlib.sha256(scene.image.tobytes() + scene.ids.tobytes()).hexdigest()
