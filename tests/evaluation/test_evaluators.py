"""The evaluators against panopticapi, detectron2's semantic evaluator and plain pycocotools, and across processes."""

import json
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog
from detectron2.evaluation import SemSegEvaluator, inference_on_dataset
from detectron2.utils import comm
from panoptic_dataset import CATEGORIES, CONTIGUOUS, LayerCosts, make_outputs, register, unregister, write_dataset
from panopticapi.utils import rgb2id
from PIL import Image

from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.evaluation.collect import gather_rows
from eco_m2f.evaluation.exit_statistics import ExitStatistics
from eco_m2f.evaluation.instance import InstanceEvaluator
from eco_m2f.evaluation.panoptic import PanopticEvaluator
from eco_m2f.evaluation.semantic import SemanticEvaluator
from eco_m2f.quality.ground_truth import PanopticGroundTruth, semantic_map

NAME = "evaluator_test_set"


@pytest.fixture
def dataset(tmp_path):
    annotations = write_dataset(tmp_path)
    register(NAME, tmp_path)
    yield tmp_path, annotations, *make_outputs(tmp_path, annotations)
    unregister(NAME)


def run(evaluator, inputs, outputs):
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def test_panoptic_equals_panopticapi(dataset, tmp_path):
    from panopticapi.evaluation import pq_compute

    root, annotations, inputs, outputs = dataset
    result = run(PanopticEvaluator(PanopticGroundTruth(NAME), str(tmp_path / "out")), inputs, outputs)["panoptic_seg"]
    (root / "pred").mkdir()
    predictions = []
    for x, y in zip(inputs, outputs):
        pred_map, segments = y["panoptic_seg"]
        rgb = np.zeros((*pred_map.shape, 3), dtype=np.uint8)
        rgb[..., 0] = pred_map.numpy()
        Image.fromarray(rgb).save(root / "pred" / f"{x['image_id']}.png")
        segments = [{**s, "category_id": CATEGORIES[s["category_id"]]["id"]} for s in segments]
        file_name = f"{x['image_id']}.png"
        predictions.append({"image_id": x["image_id"], "file_name": file_name, "segments_info": segments})
    (root / "pred.json").write_text(json.dumps({"annotations": predictions}))
    expected = pq_compute(str(root / "panoptic.json"), str(root / "pred.json"))
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            assert result[key.upper() + suffix] == pytest.approx(100 * expected[group][key], abs=1e-7)
    written = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert written["All"]["pq"] == pytest.approx(result["PQ"] / 100)
    assert set(written["per_class"]) == {c["name"] for c in CATEGORIES}
    assert set(written["per_image_pq"]) == {str(x["image_id"]) for x in inputs}


def run_from_png(root, inputs, outputs):
    register(NAME, root, sem_seg_root=str(root))
    return run(SemanticEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["sem_seg"]


def load_png(path, dtype):
    return np.asarray(Image.open(path), dtype=dtype)


def test_semantic_equals_detectron2(dataset):
    """Against detectron2's evaluator, with PNGs of class ids written from the annotation."""
    root, annotations, inputs, outputs = dataset
    derived = run(SemanticEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["sem_seg"]
    inputs = [{**x, "file_name": str(x["image_id"])} for x in inputs]
    for x, a in zip(inputs, annotations):
        id_map = rgb2id(np.array(Image.open(root / "panoptic" / a["file_name"])))
        truth = np.full(id_map.shape, 255, dtype=np.uint8)
        for s in a["segments_info"]:
            truth[id_map == s["id"]] = CONTIGUOUS[s["category_id"]]
        x["sem_seg_file_name"] = str(root / f"{x['image_id']}_semantic.png")
        Image.fromarray(truth).save(x["sem_seg_file_name"])
    from_png = run_from_png(root, inputs, outputs)
    register(NAME, root, stuff_dataset_id_to_contiguous_id=CONTIGUOUS)  # it wants things among the stuff
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: inputs)
    official = SemSegEvaluator(NAME, distributed=False, sem_seg_loading_fn=load_png)  # its own loader: NumPy 1 only
    expected = run(official, inputs, outputs)["sem_seg"]
    assert 20 < derived["mIoU"] < 99
    for key in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-cat", "IoU-grass"):
        assert derived[key] == pytest.approx(expected[key], abs=1e-4), key  # detectron2 sums in float32
        assert from_png[key] == derived[key]


def test_semantic_refuses_another_number_of_classes(dataset):
    _, _, inputs, outputs = dataset
    outputs[0]["sem_seg"] = outputs[0]["sem_seg"][:3]
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        run(SemanticEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)


def test_instances_equal_pycocotools_on_an_instance_json(dataset):
    """Against the metrics that COCOeval prints for the same objects in a hand-made COCO JSON."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root, annotations, inputs, outputs = dataset
    objects, results = [], []
    for a, y in zip(annotations, outputs):
        id_map = rgb2id(np.array(Image.open(root / "panoptic" / a["file_name"])))
        for s in a["segments_info"]:
            if CONTIGUOUS[s["category_id"]] < 2:
                code = rle.encode(np.asfortranarray((id_map == s["id"]).astype(np.uint8)))
                box = rle.toBbox(code).tolist()
                code["counts"] = code["counts"].decode()
                row = {"id": len(objects) + 1, "image_id": a["image_id"], "bbox": box, "segmentation": code}
                objects.append({**row, **{k: s[k] for k in ("category_id", "iscrowd", "area")}})
        predicted = y["instances"]
        for m, s, c in zip(predicted.pred_masks, predicted.scores, predicted.pred_classes):
            code = rle.encode(np.asfortranarray(m.numpy().astype(np.uint8)))
            row = {"image_id": a["image_id"], "segmentation": code, "score": float(s)}
            results.append({**row, "category_id": CATEGORIES[int(c)]["id"]})
    images = [{"id": a["image_id"], "height": 48, "width": 64} for a in annotations]
    content = {"info": {}, "images": images, "annotations": objects, "categories": CATEGORIES[:2]}
    (root / "instances.json").write_text(json.dumps(content))
    truth = COCO(str(root / "instances.json"))
    reference = COCOeval(truth, truth.loadRes(results), "segm")
    reference.evaluate(), reference.accumulate(), reference.summarize()
    expected = [100 * v if v >= 0 else np.nan for v in reference.stats[:6]]

    derived = run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["segm"]
    unregister(NAME)
    register(NAME, root, json_file=str(root / "instances.json"))
    from_json = run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["segm"]
    assert 5 < derived["AP"] < 95
    for result in (derived, from_json):
        measured = [result[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        np.testing.assert_allclose(measured, expected, atol=1e-9)
    assert derived["AP"] == pytest.approx((derived["AP-cat"] + derived["AP-dog"]) / 2)


def _instance_json(root, annotations, change=lambda content: None):
    """The things as an instance JSON with ids from 0, after a change."""
    objects = []
    for a in annotations:
        id_map = rgb2id(np.array(Image.open(root / "panoptic" / a["file_name"])))
        for s in (s for s in a["segments_info"] if CONTIGUOUS[s["category_id"]] < 2):
            counts = np.diff(
                np.flatnonzero(np.diff((id_map == s["id"]).ravel(order="F"), prepend=0, append=-1))
            ).tolist()
            first = int(np.argmax((id_map == s["id"]).ravel(order="F")))
            row = {"id": len(objects), "image_id": a["image_id"], "area": s["area"], "iscrowd": s["iscrowd"]}
            code = {"size": [48, 64], "counts": [first, *counts]}
            objects.append({**row, "category_id": s["category_id"], "segmentation": code})
    images = [{"id": a["image_id"]} for a in annotations]
    content = {"images": images, "annotations": objects, "categories": CATEGORIES[:2]}
    change(content)
    (root / "instances.json").write_text(json.dumps(content))
    unregister(NAME)
    register(NAME, root, json_file=str(root / "instances.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: None,
        lambda c: [o.update(area=0) for o in c["annotations"]],
        lambda c: [o.update(area=10**6) for o in c["annotations"]],
        lambda c: [(o.pop("area"), o.pop("id")) for o in c["annotations"]],
    ],
    ids=["ids from 0", "area 0", "area huge", "neither"],
)
def test_instance_json_gives_the_same_however_its_objects_are_numbered(dataset, change):
    root, annotations, inputs, outputs = dataset
    expected = run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["segm"]
    _instance_json(root, annotations, change)
    result = run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["segm"]
    assert result == pytest.approx(expected, nan_ok=True) and 5 < expected["AP"] < 95


def test_instance_json_that_does_not_go_with_the_panoptic_one(dataset):
    root, annotations, inputs, outputs = dataset
    for change, text in (
        (lambda c: c.update(categories=CATEGORIES[:1], annotations=[]), "7 dog"),
        (lambda c: c["annotations"][0].update(category_id=77), "unknown category"),
        (lambda c: c["images"].append(c["images"][0]), "duplicate image id"),
    ):
        _instance_json(root, annotations, change)
        with pytest.raises(ValueError, match=f"instances.json.*{text}"):
            InstanceEvaluator(PanopticGroundTruth(NAME))
    for change, text in (
        (lambda c: c.update(images=c["images"][1:], annotations=[]), "image 100 is not in `images`"),
        (lambda c: c["annotations"][0]["segmentation"].update(size=[64, 48]), r"image 100 has a mask of \(64, 48\)"),
    ):
        _instance_json(root, annotations, change)
        with pytest.raises(ValueError, match=f"instances.json: .*{text}"):
            run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)


def test_ground_truth_of_other_categories_than_registered(dataset):
    content = json.loads((dataset[0] / "panoptic.json").read_text())
    content["categories"][0]["name"] = "lion"
    (dataset[0] / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="panoptic.json are not those of dataset.*3 cat.*3 lion"):
        PanopticGroundTruth(NAME)


def test_ids_of_both_types_can_be_gathered():
    assert list(gather_rows({"b": 1, 9: 2, "a": 3, -4: 4})) == [-4, 9, "a", "b"]


def test_instances_without_any_prediction_score_zero(dataset):
    _, _, inputs, outputs = dataset
    for y in outputs:
        y["instances"] = y["instances"][:0]
    assert run(InstanceEvaluator(PanopticGroundTruth(NAME)), inputs, outputs)["segm"]["AP"] == 0.0


def test_exit_statistics(dataset, tmp_path):
    _, _, inputs, outputs = dataset
    for y, k in zip(outputs, (2, 2, 6, 3, 2)):
        y["exit"] = k
    inputs = [{"image_id": x["image_id"], "image": torch.empty(3, 50, 70)} for x in inputs]
    inputs[0] |= {"height": 100, "width": 140}
    result = run(ExitStatistics(LayerCosts(), str(tmp_path / "out")), inputs, outputs)["exits"]
    pixels = (64 * 96 + (4 * 50 * 70 + 100 * 140) / 5) / 1000
    assert result == {
        "mean_exit": 3.0, "GFLOPs": pytest.approx(30 + pixels), "encoder_GFLOPs": 3.0,
        "images@2": 3, "images@3": 1, "images@6": 1,
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "exits.json").read_text())
    assert written["per_image"]["102"] == 6
    for y in outputs:
        del y["exit"]
    assert run(ExitStatistics(LayerCosts()), inputs, outputs) == {}


class Replay(torch.nn.Module):
    """A model that returns the ground truth."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, batch):
        return [self.outputs[x["image_id"]] for x in batch]


def test_table_in_detectron2s_loop(dataset):
    _, _, inputs, outputs = dataset
    model = Replay({x["image_id"]: y for x, y in zip(inputs, outputs)})
    loader = [[x] for x in inputs]
    result = inference_on_dataset(model, loader, evaluators_for(NAME, costs=LayerCosts()))
    assert set(result) == {"exits", "panoptic_seg", "sem_seg", "segm"}
    evaluators = evaluators_for(NAME, costs=LayerCosts(), instance_on=False, semantic_on=False)
    only = inference_on_dataset(model, loader, evaluators)
    assert set(only) == {"exits", "panoptic_seg"}
    assert only["panoptic_seg"] == result["panoptic_seg"]
    assert "exits" not in inference_on_dataset(model, loader, evaluators_for(NAME))


def test_table_refuses_what_it_does_not_know(dataset):
    root = dataset[0]
    unregister(NAME)
    register(NAME, root, evaluator_type="lvis")
    with pytest.raises(ValueError, match="'lvis'"):
        evaluators_for(NAME)


def test_ground_truth_says_what_is_missing(dataset):
    root = dataset[0]
    with pytest.raises(ValueError, match="image 7 "):
        PanopticGroundTruth(NAME).segments(7)
    unregister(NAME)
    register(NAME, root, panoptic_json=str(root / "nothing.json"))
    with pytest.raises(ValueError, match="nothing.json"):
        PanopticGroundTruth(NAME)
    with pytest.raises(ValueError, match="no panoptic_json"):
        PanopticGroundTruth("a_set_without_metadata")


def test_semantic_map_keeps_crowds_and_ignores_the_rest():
    id_map = np.array([[0, 5], [9, 11]])
    segments = [{"id": 5, "category_id": 3, "iscrowd": 1}, {"id": 9, "category_id": 77}]
    np.testing.assert_array_equal(semantic_map(id_map, segments, {3: 0}, 255), [[255, 0], [255, 255]])


def _evaluate_on_rank(rank, world_size, root, init_file, result_file):
    torch.distributed.init_process_group(
        "gloo", f"file://{init_file}", timedelta(minutes=2), rank=rank, world_size=world_size
    )
    try:
        _judge_on_rank(rank, world_size, root, result_file)
    finally:
        torch.distributed.destroy_process_group()
        comm._get_global_gloo_group.cache_clear()  # the group is gone


def _judge_on_rank(rank, world_size, root, result_file):
    register(NAME, root)
    annotations = json.loads((root / "panoptic.json").read_text())["annotations"]
    inputs, outputs = make_outputs(root, annotations)
    evaluators = evaluators_for(NAME, costs=LayerCosts())
    evaluators.reset()
    # as detectron2's sampler, but interleaved, and with one image on both
    evaluators.process(inputs[rank::world_size] + inputs[:1], outputs[rank::world_size] + outputs[:1])
    result = evaluators.evaluate()
    assert bool(result) == (rank == 0)
    if rank == 0:
        result_file.write_text(json.dumps(result))
    _one_fails_on_one_rank(evaluators, inputs, outputs, rank)
    torch.distributed.barrier()  # no process closes its connections while another still reads from them


def _one_fails_on_one_rank(evaluators, inputs, outputs, rank):
    """AP fails on the second process, mIoU on the first. Neither waits for the other."""
    broken = [{k: v for k, v in y.items() if k != "instances" or rank == 0} for y in outputs]
    evaluators.reset()
    evaluators.process(inputs, broken)
    if rank == 0:
        evaluators._evaluators["SemanticEvaluator"].summary = lambda rows: {}["mIoU"]
    result = evaluators.evaluate()
    assert evaluators.failures.keys() == {"InstanceEvaluator", "SemanticEvaluator"}
    assert len(evaluators.errors) == 1
    assert result is None if rank else set(result) == {"exits", "panoptic_seg"}


def test_two_processes_equal_one(dataset, tmp_path):
    _, _, inputs, outputs = dataset
    evaluators = evaluators_for(NAME, costs=LayerCosts())
    evaluators.reset()
    evaluators.process(inputs, outputs)
    expected = json.loads(json.dumps(evaluators.evaluate()))
    shared = (2, tmp_path, tmp_path / "init", tmp_path / "result")
    other = mp.get_context("spawn").Process(target=_evaluate_on_rank, args=(1, *shared))
    other.start()
    try:
        _evaluate_on_rank(0, *shared)
    finally:
        other.join()
    assert other.exitcode == 0
    result = json.loads((tmp_path / "result").read_text())
    assert repr(result) == repr(expected)  # to the last bit; repr, since NaN is not equal to itself
