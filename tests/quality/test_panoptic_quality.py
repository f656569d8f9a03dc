"""Per-image and dataset PQ against panopticapi, the official evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from eco_m2f.quality.panoptic_quality import (
    PanopticComparison,
    contiguous_to_dataset_id,
    dataset_pq,
    image_pq,
    image_statistics,
    to_dataset_categories,
)
from eco_m2f.quality.statistics import total_statistics

CATEGORIES = [{"id": c, "name": str(c), "isthing": int(c < 40), "color": [c, c, c]} for c in (3, 7, 12, 41, 90)]


def blocky_map(rng, height, width, ids, cell=6):
    """A map of random rectangles with few ids, large enough that segments match."""
    coarse = rng.choice(ids, size=(height // cell + 1, width // cell + 1))
    return np.kron(coarse, np.ones((cell, cell), dtype=np.int64))[:height, :width]


def segments_of(id_map, category_of, **extra):
    ids = [int(i) for i in np.unique(id_map) if i != 0]
    return [{"id": i, "category_id": category_of[i], **extra} for i in ids]


def make_case(seed):
    """Ground truth with void, crowds, unknown ids and an odd size, and a corrupted copy as prediction."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, size=2)
    big = seed % 2 == 1  # ids of a panoptic PNG, up to 2^24
    ids = rng.choice(np.arange(1, 2**24 if big else 60), size=9, replace=False)
    category_of = {int(i): int(rng.choice([c["id"] for c in CATEGORIES])) for i in ids}
    gt_map = blocky_map(rng, height, width, np.append(ids, 0))
    gt_segments = [
        {**s, "iscrowd": int(rng.random() < 0.3), "area": int((gt_map == s["id"]).sum())}
        for s in segments_of(gt_map, category_of)
    ]
    if seed % 3 == 0:
        gt_segments = gt_segments[1:]  # an id of the PNG that the JSON lacks
    noise = blocky_map(rng, height, width, np.append(ids, 0), cell=3)
    pred_map = np.where(rng.random(gt_map.shape) < 0.25, noise, gt_map)
    if rng.random() < 0.5:
        relabelled = rng.choice(ids)
        category_of[int(relabelled)] = CATEGORIES[0]["id"]
    return gt_map, gt_segments, pred_map, segments_of(pred_map, category_of)


def id_to_rgb(id_map):
    return np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536], axis=-1).astype(np.uint8)


def official(tmp_path, cases, categories):
    """panopticapi's pq_compute on the cases written as files."""
    from panopticapi.evaluation import pq_compute

    for side, which in (("gt", (0, 1)), ("pred", (2, 3))):
        folder = tmp_path / side
        folder.mkdir()
        annotations = []
        for i, case in enumerate(cases):
            Image.fromarray(id_to_rgb(case[which[0]])).save(folder / f"{i}.png")
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": case[which[1]]})
        (tmp_path / f"{side}.json").write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return pq_compute(str(tmp_path / "gt.json"), str(tmp_path / "pred.json"))


def assert_same(result, expected):
    for group in ("All", "Things", "Stuff"):
        assert result[group]["n"] == expected[group]["n"]
        for key in ("pq", "sq", "rq"):
            assert result[group][key] == pytest.approx(expected[group][key], abs=1e-9), (group, key)
    assert result["per_class"].keys() == expected["per_class"].keys()
    for category, row in expected["per_class"].items():
        assert result["per_class"][category] == pytest.approx(row, abs=1e-9), category


def test_generated_set_equals_panopticapi(tmp_path):
    cases = [make_case(seed) for seed in range(40)]
    statistics = [
        image_statistics(pred, pred_segments, gt, gt_segments) for gt, gt_segments, pred, pred_segments in cases
    ]
    total = total_statistics(statistics)
    assert total.tp.sum() > 20 and total.fp.sum() > 20 and total.fn.sum() > 20  # the cases exercise every count
    assert_same(dataset_pq(total, CATEGORIES), official(tmp_path, cases, CATEGORIES))


@pytest.mark.parametrize("seed", range(6))
def test_single_image_equals_panopticapi(tmp_path, seed):
    """The PQ of an image is that of a dataset with only this image."""
    case = make_case(seed)
    gt, gt_segments, pred, pred_segments = case
    statistics = image_statistics(pred, pred_segments, gt, gt_segments)
    assert all(np.diff(statistics.category_id) > 0)
    assert np.all(statistics.tp + statistics.fp + statistics.fn > 0)
    everything_is_a_thing = [{**c, "isthing": i % 2} for i, c in enumerate(CATEGORIES)]
    try:
        expected = official(tmp_path, [case], everything_is_a_thing)
    except ZeroDivisionError:
        pytest.skip("panopticapi cannot average over no category")
    assert image_pq(statistics) == pytest.approx(expected["All"]["pq"], abs=1e-9)


@pytest.mark.parametrize("area", [0, 7, 10**9, None, float("nan")])
def test_the_area_of_a_segment_is_its_masks(area):
    gt, gt_segments, pred, pred_segments = make_case(1)
    expected = image_statistics(pred, pred_segments, gt, gt_segments)
    believed = image_statistics(pred, pred_segments, gt, [{**s, "area": area} for s in gt_segments])
    assert image_pq(believed) == image_pq(expected) <= 1 and believed.tp.tolist() == expected.tp.tolist()


def test_coco_sample_equals_panopticapi(shared, tmp_path):
    root = shared / "data" / "coco_panoptic_sample" / "sample_data"
    annotation = json.loads((root / "panoptic_examples.json").read_text())
    cases = []
    for entry in annotation["annotations"]:
        gt = rgb2id(np.array(Image.open(root / "panoptic_examples" / entry["file_name"])))
        pred = np.roll(gt, (3, 5), axis=(0, 1))  # every segment moved a little; void moves with them
        pred[:, :60] = np.where(pred[:, :60] == 0, pred.max(), pred[:, :60])
        category_of = {s["id"]: s["category_id"] for s in entry["segments_info"]}
        cases.append((gt, entry["segments_info"], pred, segments_of(pred, category_of)))
    total = total_statistics(image_statistics(c[2], c[3], c[0], c[1]) for c in cases)
    result = dataset_pq(total, annotation["categories"])
    assert 0.2 < result["All"]["pq"] < 0.95
    assert_same(result, official(tmp_path, cases, annotation["categories"]))


def test_perfect_prediction_scores_one():
    gt, gt_segments, _, _ = make_case(2)
    gt_segments = [{**s, "iscrowd": 0} for s in gt_segments]
    assert image_pq(image_statistics(gt, gt_segments, gt, gt_segments)) == 1.0


def test_crowd_and_void_are_ignored():
    gt = np.zeros((4, 10), dtype=np.int32)
    gt[:, :4], gt[:, 4:8] = 5, 9  # a crowd, a segment, and two columns of void
    gt_segments = [{"id": 5, "category_id": 1, "iscrowd": 1}, {"id": 9, "category_id": 2}]
    pred = np.zeros_like(gt)
    pred[:, :3], pred[:, 4:] = 1, 2  # inside the crowd; the segment and all of the void
    statistics = image_statistics(pred, [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}], gt, gt_segments)
    assert statistics.category_id.tolist() == [2]
    assert statistics.iou.tolist() == [1.0]
    assert (statistics.tp.tolist(), statistics.fp.tolist(), statistics.fn.tolist()) == ([1], [0], [0])


def test_iou_of_exactly_one_half_is_no_match():
    gt = np.array([[4, 4, 0, 0]])
    pred = np.array([[1, 1, 1, 1]])
    gt_unknown = np.array([[4, 4, 8, 8]])  # 8 is in no segment: unlike void, it counts in the union
    segments = [{"id": 4, "category_id": 1}]
    assert image_pq(image_statistics(pred, [{"id": 1, "category_id": 1}], gt, segments)) == 1.0
    statistics = image_statistics(pred, [{"id": 1, "category_id": 1}], gt_unknown, segments)
    assert (statistics.tp.tolist(), statistics.fp.tolist(), statistics.fn.tolist()) == ([0], [1], [1])


def test_no_category_gives_zero():
    empty = np.zeros((3, 3), dtype=np.int32)
    statistics = image_statistics(empty, [], empty, [])
    assert len(statistics.category_id) == 0
    assert image_pq(statistics) == 0.0
    assert image_pq(total_statistics([])) == 0.0
    result = dataset_pq(total_statistics([statistics]), CATEGORIES)
    assert result["All"]["n"] == 0 and np.isnan(result["All"]["pq"])


def test_target_is_reusable_and_segments_missing_from_the_map_are_misses():
    gt, gt_segments, pred, pred_segments = make_case(1)
    target = PanopticComparison(gt, [*gt_segments, {"id": 123, "category_id": 3, "area": 0}])
    first, second = target.compare(pred, pred_segments), target.compare(pred, pred_segments)
    for name in ("category_id", "iou", "tp", "fp", "fn"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    plain = image_statistics(pred, pred_segments, gt, gt_segments)
    assert first.fn.sum() == plain.fn.sum() + 1


@pytest.mark.parametrize(
    "pred, segments, message",
    [
        (np.ones((2, 3), dtype=int), [{"id": 1, "category_id": 1}], "resize"),
        (np.ones((2, 2), dtype=int), [], r"only in the predicted map: \[1\]"),
        (np.zeros((2, 2), dtype=int), [{"id": 4, "category_id": 1}], r"only in its segments: \[4\]"),
        (np.zeros((2, 2), dtype=int), [{"id": 0, "category_id": 1}], "unique and not 0"),
        (np.zeros((2, 2)), [], "integer ids"),
        (np.full((2, 2), -1), [], "holds the id -1"),
    ],
)
def test_contradictions_are_refused(pred, segments, message):
    with pytest.raises(ValueError, match=message):
        image_statistics(pred, segments, np.zeros((2, 2), dtype=int), [])


def test_unlisted_category_is_refused():
    gt = np.ones((2, 2), dtype=int)
    statistics = image_statistics(gt, [{"id": 1, "category_id": 999}], gt, [{"id": 1, "category_id": 999}])
    with pytest.raises(ValueError, match="999"):
        dataset_pq(statistics, CATEGORIES)


def test_contiguous_ids_map_back():
    metadata = SimpleNamespace(
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1}, stuff_dataset_id_to_contiguous_id={41: 2}
    )
    dataset_id = contiguous_to_dataset_id(metadata)
    segments = [{"id": 1, "isthing": False, "category_id": 2}]
    assert to_dataset_categories(segments, dataset_id) == [{"id": 1, "isthing": False, "category_id": 41}]
    assert segments[0]["category_id"] == 2
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        to_dataset_categories([{"id": 1, "category_id": 3}], dataset_id)
