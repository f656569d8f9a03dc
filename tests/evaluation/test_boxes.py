"""AP of boxes: of a dataset against COCOeval, of an image against a dataset of that image alone."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eco_m2f.data.datasets import register_coco_boxes
from eco_m2f.evaluation.boxes import BoxEvaluator
from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.quality import BoxAP
from eco_m2f.quality.average_precision import ObjectComparison
from eco_m2f.quality.boxes import PackedBoxes, to_detections
from eco_m2f.quality.ground_truth import BoxGroundTruth

NAME = "box_test_set"
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "bird"}]  # not in order
CONTIGUOUS = {3: 0, 7: 1, 90: 2}
NUM_IMAGES = 6


def make_objects() -> list[dict]:
    """Five images with objects, one also with a crowd. Image 105 has no objects."""
    rng = np.random.default_rng(0)
    objects = []
    for image in range(100, 100 + NUM_IMAGES - 1):
        for _ in range(rng.integers(2, 6)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(4, 60, 2)]
            category = int(rng.choice([3, 7, 90], p=[0.5, 0.4, 0.1]))
            row = {"id": len(objects) + 1, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
            objects.append({**row, "area": box[2] * box[3] * 0.7})
    crowd = next(o for o in objects if o["image_id"] == 102)
    crowd["iscrowd"] = 1
    return objects


def make_outputs(objects) -> dict:
    """Boxes near the true ones, at times twice or of another class, and false ones, with random scores."""
    rng = np.random.default_rng(1)
    outputs = {}
    for image in range(100, 100 + NUM_IMAGES):
        boxes, classes = [], []
        for o in (o for o in objects if o["image_id"] == image):
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = np.array(o["bbox"]) * rng.normal(1, 0.08, 4)
                boxes.append([x, y, x + w, y + h])
                classes.append(CONTIGUOUS[o["category_id"]] if rng.random() < 0.8 else rng.integers(3))
        for _ in range(3):
            x, y, w, h = rng.uniform(0, 60, 4)
            boxes.append([x, y, x + w, y + h])
            classes.append(rng.integers(3))
        instances = Instances((120, 120))
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
        instances.scores = torch.from_numpy(rng.random(len(boxes))).float()
        instances.pred_classes = torch.tensor(np.array(classes), dtype=torch.int64)
        outputs[image] = instances
    return outputs


@pytest.fixture
def dataset(tmp_path):
    objects = make_objects()
    images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 120} for i in range(100, 100 + NUM_IMAGES)]
    content = {"info": {}, "images": images, "annotations": objects, "categories": CATEGORIES}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    register_coco_boxes(NAME, tmp_path, tmp_path / "boxes.json")
    yield tmp_path / "boxes.json", objects, make_outputs(objects)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def coco_stats(json_file, detections, image_ids) -> np.ndarray:
    """The metrics that COCOeval prints for these images."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        reference = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        reference.params.imgIds = list(image_ids)
        reference.evaluate(), reference.accumulate(), reference.summarize()
    return reference.stats


def test_the_dataset_equals_cocoevals_summary(dataset, tmp_path):
    json_file, _, outputs = dataset
    truth = BoxGroundTruth(NAME)
    evaluator = evaluators_for(NAME, str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process([{"image_id": i} for i in outputs], [{"instances": o} for o in outputs.values()])
    result = evaluator.evaluate()["bbox"]
    detections = [{"image_id": i, **d} for i, o in outputs.items() for d in to_detections(o, truth.dataset_id)]
    expected = coco_stats(json_file, detections, outputs)[:6]
    measured = [result[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    np.testing.assert_allclose(measured, [100 * v if v >= 0 else np.nan for v in expected], atol=1e-9)
    assert 5 < result["AP"] < 95
    assert result["AP"] == pytest.approx(np.mean([result[f"AP-{c['name']}"] for c in CATEGORIES]))
    written = json.loads((tmp_path / "out" / NAME / "boxes.json").read_text())
    assert written["AP"] == pytest.approx(result["AP"] / 100)
    assert len(written["per_image_ap"]) == NUM_IMAGES
    assert result["AP_image"] == pytest.approx(100 * np.mean(list(written["per_image_ap"].values())))


def test_an_image_is_a_dataset_of_one(dataset):
    json_file, _, outputs = dataset
    truth, quality_of = BoxGroundTruth(NAME), BoxAP.of(NAME)
    seen = set()
    for i in list(outputs)[:-1]:
        detections = [{"image_id": i, **d} for d in to_detections(outputs[i], truth.dataset_id)]
        expected = coco_stats(json_file, detections, [i])[0]
        [(quality, statistics)] = quality_of.comparison({"image_id": i})([PackedBoxes.of(outputs[i])])
        assert quality == pytest.approx(expected, abs=1e-12) and statistics is None
        seen.add(round(quality, 6))
    assert len(seen) > 3 and all(0 <= q < 1 for q in seen)


def test_perfect_and_empty_predictions(dataset):
    truth = BoxGroundTruth(NAME)
    for i in (100, 102):
        objects = truth.objects(i)
        perfect = [{"category_id": o["category_id"], "bbox": o["bbox"], "score": 0.9} for o in objects]
        assert ObjectComparison(objects, "bbox").ap(perfect) == pytest.approx(1.0)
        assert ObjectComparison(objects, "bbox").ap([]) == 0.0


def test_an_image_without_objects_has_quality_0_whatever_is_found(dataset):
    _, objects, outputs = dataset
    assert BoxAP.of(NAME).comparison({"image_id": 105})([PackedBoxes.of(outputs[105])]) == [(0.0, None)]
    crowd = [{**objects[0], "iscrowd": 1}]
    detection = {"category_id": objects[0]["category_id"], "bbox": objects[0]["bbox"], "score": 0.9}
    assert ObjectComparison(crowd, "bbox").ap([detection]) == 0.0


def test_an_object_of_id_0_counts(dataset):
    _, objects, _ = dataset
    thing = {**objects[0], "id": 0, "iscrowd": 0}
    detection = {"category_id": thing["category_id"], "bbox": thing["bbox"], "score": 0.9}
    assert ObjectComparison([thing], "bbox").ap([detection]) == pytest.approx(1.0)


@pytest.mark.parametrize("change", [lambda o, n: o.update(id=n), lambda o, n: o.pop("id")], ids=["from 0", "none"])
def test_annotation_ids_do_not_matter(dataset, change):
    json_file, objects, outputs = dataset

    def perfect() -> dict:
        evaluator = BoxEvaluator(BoxGroundTruth(NAME))
        for i in outputs:
            found = Instances((120, 120))
            boxes = torch.tensor([o["bbox"] for o in objects if o["image_id"] == i]).reshape(-1, 4)
            found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
            found.pred_classes = torch.tensor([CONTIGUOUS[o["category_id"]] for o in objects if o["image_id"] == i])
            found.scores = torch.full((len(boxes),), 0.9)
            evaluator.process([{"image_id": i}], [{"instances": found}])
        return evaluator.evaluate()["bbox"]

    expected = perfect()
    content = json.loads(json_file.read_text())
    for n, o in enumerate(content["annotations"]):
        change(o, n)
    json_file.write_text(json.dumps(content))
    assert perfect() == pytest.approx(expected, nan_ok=True) and expected["AP"] == pytest.approx(100)


def test_a_dataset_without_any_object(dataset):
    json_file, _, outputs = dataset
    content = json.loads(json_file.read_text())
    json_file.write_text(json.dumps({**content, "annotations": []}))
    evaluator = BoxEvaluator(BoxGroundTruth(NAME))
    evaluator.process([{"image_id": i} for i in outputs], [{"instances": o} for o in outputs.values()])
    result = evaluator.evaluate()["bbox"]
    assert np.isnan(result["AP"]) and result["AP_image"] == 0


def test_a_file_of_other_categories_is_refused(dataset):
    json_file = dataset[0]
    content = json.loads(json_file.read_text())
    content["categories"][0]["name"] = "lion"
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="boxes.json are not those of dataset.*7 cat.*7 lion"):
        BoxGroundTruth(NAME)


def test_detections_are_in_the_ids_of_the_file(dataset):
    _, _, outputs = dataset
    found = to_detections(outputs[100], BoxGroundTruth(NAME).dataset_id)
    inverse = {v: k for k, v in CONTIGUOUS.items()}
    assert [d["category_id"] for d in found] == [inverse[c] for c in outputs[100].pred_classes.tolist()]
    x0, y0, x1, y1 = outputs[100].pred_boxes.tensor[0].tolist()
    assert found[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-5)


def test_what_is_missing_is_named(dataset):
    with pytest.raises(ValueError, match="image 7 is not in .*boxes.json"):
        BoxGroundTruth(NAME).objects(7)
    with pytest.raises(ValueError, match="'toy_panoptic_val' has no json_file"):
        BoxGroundTruth("toy_panoptic_val")
    dataset[0].unlink()
    with pytest.raises(ValueError, match="boxes.json: detection JSON not found"):
        BoxEvaluator(BoxGroundTruth(NAME))
