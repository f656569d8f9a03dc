"""Cityscapes' AP against the benchmark's own script, and against cases counted by hand.

tests/assets/cityscapes_ap.json has the results of the script (cityscapesscripts 2.3.0) on generated sets. If the
package is installed, it runs again.
"""

import importlib.util
import json
import os
from unittest import mock

import cityscapes_set
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.evaluation.cityscapes_instances import (
    CityscapesInstanceEvaluator,
    CityscapesInstances,
    ImageInstances,
    Prediction,
    average_precision,
)
from eco_m2f.evaluation.panoptic import PanopticEvaluator
from eco_m2f.quality.ground_truth import PanopticGroundTruth

NAME = "generated_cityscapes"
SEEDS = (0, 1, 2)


@pytest.fixture
def make(tmp_path):
    """Writes and registers a generated set. Returns its ground truth, inputs and outputs."""

    def made(seed: int):
        inputs, outputs = cityscapes_set.write(tmp_path, seed)
        path = tmp_path / "panoptic.json"
        categories = [
            {"id": label, "name": meta.stuff_classes[i], "isthing": isthing}
            for isthing, table in enumerate(
                (meta.stuff_dataset_id_to_contiguous_id, meta.thing_dataset_id_to_contiguous_id)
            )
            for label, i in table.items()
        ]
        ids = [x["image_id"] for x in inputs]
        annotations = [{"image_id": i, "file_name": f"{i}.png", "segments_info": []} for i in ids]
        images = [{"id": i, "file_name": f"{i}_leftImg8bit.png"} for i in ids]
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        cityscapes_set.register(NAME, tmp_path, panoptic_json=str(path), panoptic_root=str(tmp_path))
        return PanopticGroundTruth(NAME), inputs, outputs

    meta = MetadataCatalog.get(cityscapes_set.OFFICIAL)
    yield made
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def measure(truth, inputs, outputs, folder=None) -> dict:
    evaluator = CityscapesInstanceEvaluator(CityscapesInstances(truth), folder)
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()["segm"]


@pytest.mark.parametrize("seed", SEEDS)
def test_ap_is_that_of_the_benchmarks_script(make, assets, seed):
    expected = json.loads((assets / "cityscapes_ap.json").read_text())[str(seed)]
    result = measure(*make(seed))
    assert 5 < result["AP"] < 80
    assert {k: v for k, v in result.items() if v == v} == pytest.approx(
        {k: v for k, v in expected.items() if v is not None}
    )
    assert {k for k, v in result.items() if v != v} == {k for k, v in expected.items() if v is None}


@pytest.mark.skipif(not importlib.util.find_spec("cityscapesscripts"), reason="needs cityscapesscripts")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_benchmarks_script_still_says_so(make, assets, seed):
    truth, inputs, outputs = make(seed)
    expected = json.loads((assets / "cityscapes_ap.json").read_text())[str(seed)]
    assert official(truth, inputs, outputs) == pytest.approx(expected)


def official(truth, inputs, outputs) -> dict:
    """The script's results. detectron2's evaluator writes the predictions in its format."""
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script
    from detectron2.evaluation import CityscapesInstanceEvaluator as Official

    results = {}

    def average(*args):
        results.update(compute(*args))
        return results

    compute, in1d = script.computeAverages, getattr(np, "in1d", np.isin)
    with mock.patch.object(script, "computeAverages", average), mock.patch.object(np, "in1d", in1d, create=True):
        evaluator = Official(truth.name)
        evaluator.reset()
        evaluator.process(inputs, outputs)
        # the last thing it does is to write JSON, in which it finds numbers of numpy that it does not know
        with mock.patch.object(script, "writeDict2JSON", create=True), mock.patch("builtins.print"):
            evaluator.evaluate()
    values = {"AP": results["allAp"], "AP50": results["allAp50%"]}
    values |= {f"AP-{name}": entry["ap"] for name, entry in results["classes"].items()}
    return {k: None if np.isnan(v) else 100 * float(v) for k, v in values.items()}


def image(annotated: dict, *predictions: Prediction) -> ImageInstances:
    return ImageInstances(annotated, predictions)


def car(score: float, pixels: int, on: dict, void: int = 0) -> Prediction:
    return Prediction(26, score, pixels, void, on)


def test_one_of_two_objects_found_by_the_surest_prediction():
    """Recall 1/2 at precision 1. A mistake of lower score adds a point of the same recall, at precision 1/2."""
    two = {26000: 200, 26001: 200}
    assert average_precision([image(two, car(0.9, 200, {26000: 200}))], 26, 0.5) == pytest.approx(0.5)
    worse = image(two, car(0.9, 200, {26000: 200}), car(0.3, 50, {7: 50}))
    # points (recall, precision): (1/2, 1/2), (1/2, 1), (0, 1), of widths 0, 1/4 and 1/4
    assert average_precision([worse], 26, 0.5) == pytest.approx(0.5)
    better = image(two, car(0.9, 200, {26000: 200}), car(0.95, 50, {7: 50}))
    # (1/2, 1/2), (0, 0), (0, 1): widths 1/4, 1/4, 0
    assert average_precision([better], 26, 0.5) == pytest.approx(0.125)


def test_a_second_prediction_of_an_object_is_a_mistake():
    twice = image({26000: 200}, car(0.9, 200, {26000: 200}), car(0.8, 200, {26000: 200}))
    # (1, 1/2), (1, 1), (0, 1): widths 0, 1/2, 1/2
    assert average_precision([twice], 26, 0.5) == pytest.approx(1.0)
    sure = image({26000: 200}, car(0.8, 200, {26000: 200}), car(0.9, 150, {26000: 150}))
    assert average_precision([sure], 26, 0.5) == pytest.approx(1.0)  # the surest counts, however well it fits


@pytest.mark.parametrize(
    "annotated, prediction",
    [
        ({26000: 99}, {26000: 60}),  # an object that is too small
        ({26: 400}, {26: 60}),  # a group
        ({4: 400}, {4: 60}),  # void
    ],
)
def test_what_does_not_count_is_neither_demanded_nor_a_mistake(annotated, prediction):
    void = 60 if 4 in annotated else 0
    other = {26007: 200}
    right, ignored = car(0.5, 200, {26007: 200}), car(0.9, 100, {7: 40, **prediction}, void)
    assert average_precision([image({**annotated, **other}, right, ignored)], 26, 0.5) == pytest.approx(1.0)
    assert average_precision([image({**annotated, **other}, right, ignored)], 26, 0.65) < 1  # 60 % are not enough
    assert np.isnan(average_precision([image(annotated, ignored)], 26, 0.5))


def test_only_ignored_predictions_make_a_zero():
    lost = image({26000: 200, 26: 400}, car(0.9, 100, {26: 100}))
    assert average_precision([lost], 26, 0.5) == 0.0
    assert average_precision([image({26000: 200})], 26, 0.5) == 0.0


def test_the_result_is_written_and_nothing_else(make, tmp_path, monkeypatch):
    truth, inputs, outputs = make(0)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    result = measure(truth, inputs, outputs, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "instances.json").read_text())["AP"] == result["AP"]
    assert os.listdir(tmp_path / "work") == []


def test_cityscapes_gets_it(make):
    make(0)
    evaluators = evaluators_for(NAME, semantic_on=False)
    kinds = [type(e) for e in evaluators._evaluators.values()]
    assert CityscapesInstanceEvaluator in kinds and PanopticEvaluator in kinds


def test_missing_and_broken_files_are_named(make, tmp_path):
    truth, inputs, outputs = make(0)
    path = tmp_path / "gtFine" / "val" / "munster" / "munster_000003_000019_gtFine_instanceIds.png"
    path.write_bytes(b"no PNG")
    with pytest.raises(ValueError, match="munster_000003_000019_gtFine_instanceIds.png.*gtFine_trainvaltest.zip"):
        measure(truth, inputs, outputs)
    path.unlink()
    with pytest.raises(
        ValueError, match=r"munster_000003_000019_gtFine_instanceIds.png is missing \(1 file\(s\) in all\)"
    ):
        CityscapesInstances(truth)


def test_masks_of_another_size_are_refused(make):
    truth, inputs, outputs = make(0)
    outputs[0]["instances"].pred_masks = outputs[0]["instances"].pred_masks[:, :50]
    with pytest.raises(ValueError, match="munster_000000_000019.*50"):
        measure(truth, inputs, outputs)
