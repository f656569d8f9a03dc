"""The tokens kept and the GFLOPs saved; mIoU on datasets of class maps."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from eco_m2f.costs import TokenCosts
from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.evaluation.token_statistics import TokenStatistics

INPUTS = [{"image_id": i, "image": torch.empty(3, 75, 78), "height": 90} for i in range(2)]


class CountCosts(TokenCosts):
    """Costs of an image of 100 tokens: 10 GFLOPs without stopping, less with fewer tokens."""

    size_divisibility = 8

    def __init__(self):
        self.known = {None: 10.0, (80, 50): 6.0, (60, 0): 4.0, (100, 100): 11.0}

    def tokens(self, padded_size):
        return 100

    def __call__(self, padded_size, output_size, kept=None):
        assert (padded_size, output_size) == ((80, 80), (90, 78))
        return self.known[kept if kept is None else tuple(kept)]


def outputs(threshold=0.9) -> list[dict]:
    return [{"tokens": {"threshold": threshold, "kept": kept}} for kept in ([0.8, 0.5], [0.6, 0.0])]


def run(evaluator, inputs, given):
    evaluator.reset()
    for x, y in zip(inputs, given):
        evaluator.process([x], [y])
    return evaluator.evaluate()


def test_means_over_images(tmp_path):
    evaluator = TokenStatistics(CountCosts(), str(tmp_path))
    result = run(evaluator, INPUTS, outputs())["tokens"]
    assert result == pytest.approx(
        {"threshold": 0.9, "kept@1": 70.0, "kept@2": 25.0, "GFLOPs": 5.0, "static_GFLOPs": 10.0, "saved": 50.0}
    )
    written = json.loads((tmp_path / "tokens.json").read_text())
    expected = {**outputs()[1]["tokens"], "gflops": 4.0, "static_gflops": 10.0}
    assert written["per_image"]["1"] == expected and written["saved"] == pytest.approx(50.0)
    again = run(evaluator, INPUTS[:1], outputs()[:1])["tokens"]
    assert again["GFLOPs"] == 6.0  # a reset forgets


def test_decisions_that_stop_nothing_cost_more_than_none():
    everything = {"kept": [1.0, 1.0]}
    for threshold, gflops in ((0.9, 11.0), (1.0, 10.0)):
        found = run(TokenStatistics(CountCosts()), INPUTS[:1], [{"tokens": {"threshold": threshold, **everything}}])
        assert (found["tokens"]["GFLOPs"], found["tokens"]["static_GFLOPs"]) == (gflops, 10.0)


def test_a_model_that_stops_no_tokens_gives_no_result():
    assert run(TokenStatistics(CountCosts()), INPUTS, [{}, {}]) == {}


@pytest.fixture
def semantic_set(tmp_path):
    """A registered dataset with only class maps."""
    classes = np.array([[0, 0, 1, 255]], dtype=np.uint8)
    Image.fromarray(classes).save(tmp_path / "a.png")
    record = {"image_id": 0, "sem_seg_file_name": str(tmp_path / "a.png")}
    DatasetCatalog.register("class_maps", lambda: [record])
    MetadataCatalog.get("class_maps").set(stuff_classes=["sky", "sea"], evaluator_type="sem_seg", ignore_label=255)
    yield record
    DatasetCatalog.remove("class_maps")
    MetadataCatalog.remove("class_maps")


def test_class_maps_alone_get_miou(semantic_set, tmp_path):
    """One of two sky pixels is predicted as sea. The void pixel does not count."""
    scores = torch.tensor([[[1.0, 0, 0, 1]], [[0.0, 1, 1, 0]]])
    evaluator = evaluators_for("class_maps", str(tmp_path / "out"), costs=CountCosts())
    result = run(evaluator, [{**INPUTS[0], **semantic_set}], [{"sem_seg": scores, **outputs()[0]}])
    assert set(result) == {"sem_seg", "tokens"}
    expected = {"IoU-sky": 50.0, "IoU-sea": 50.0, "mIoU": 50.0, "pACC": 200 / 3}
    assert {k: result["sem_seg"][k] for k in expected} == pytest.approx(expected)
    written = {p.name for p in (tmp_path / "out" / "class_maps").iterdir()}
    assert written == {"semantic.json", "tokens.json", "results.json"}


def test_class_maps_alone_need_a_semantic_model(semantic_set):
    with pytest.raises(ValueError, match="'class_maps' has only class maps: set .*SEMANTIC_ON"):
        evaluators_for("class_maps", semantic_on=False)
