"""The table and the choice of pictures. tests/tools/test_recipe.py has the report of a real run."""

import json

import numpy as np
import pytest
import torch
from derived_by_depth import EXITS, make_derived
from PIL import Image

from eco_m2f.data.datasets import register_from_config
from eco_m2f.gates.frontier import GateFitter, fixed_rows
from eco_m2f.quality import QUALITY_REGISTRY
from eco_m2f.quality.ground_truth import PanopticGroundTruth
from eco_m2f.report.predictions import _colors, _predict, spread_over_exits
from eco_m2f.report.results import PARENT, STEP_A, Result, collect, evaluated
from eco_m2f.report.table import markdown


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    return make_derived(tmp_path_factory.mktemp("derived") / "val", 60, seed=1)


def test_markdown_has_a_line_per_result_and_the_part_of_the_cost(derived):
    head, rule, *lines = markdown(
        [Result(PARENT, f"all at {r.max_exit}", r) for r in fixed_rows(derived)], derived.quality_kind
    )
    assert head.count("|") == rule.count("|") and len(lines) == len(EXITS)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [c[9] for c in cells] == ["33 %", "67 %", "100 %"]  # 10 GFLOPs a layer
    assert [c[10] for c in cells] == [f"{k}:60" for k in EXITS]
    assert all(c[5] == "" for c in cells)  # not evaluated by the whole model


def test_results_hold_forced_exits_gates_and_targets(tmp_path, derived):
    train = make_derived(tmp_path / "train", 200, seed=2)
    gate = GateFitter(train, derived).fit(0.005, 6).gate
    for name, pq in (("full", 0.5), ("some_gate", 0.25)):
        folder = tmp_path / "eval" / name / "inference" / "toy"
        folder.mkdir(parents=True)
        (folder / "panoptic.json").write_text(f'{{"All": {{"pq": {pq}}}}}')
    results = collect(tmp_path, derived, derived, {"some_gate": gate})
    assert [r.row.policy for r in results] == ["fixed"] * 6 + ["gate", "mixture", "oracle"]
    assert [r.evaluated.get("evaluated_pq") for r in results] == [None] * 5 + [50.0, 25.0, None, None]
    assert results[6].row.exact["pq"] == gate.results["pq"] and results[6].model == STEP_A


def test_of_boxes_the_mean_ap_of_the_images_takes_the_place_of_pq(tmp_path):
    about = {"with_statistics": False, "measure": "AP"}
    train, val = (make_derived(tmp_path / name, n, seed, **about) for name, n, seed in (("a", 200, 2), ("b", 60, 1)))
    gate = GateFitter(train, val).fit(0.005, 6).gate
    for name in ("full", "some_gate"):
        folder = tmp_path / "eval" / name / "inference" / "toy"
        folder.mkdir(parents=True)
        (folder / "boxes.json").write_text('{"AP": 0.25, "AP_image": 0.5}')
    results = collect(tmp_path, val, val, {"some_gate": gate})
    whole = {"evaluated_ap": 50.0, "dataset_ap": 25.0}
    assert [r.evaluated for r in results[5:]] == [whole, whole, {}, {}]
    head, _, *lines = markdown(results, val.quality_kind)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert cells[0][2:5] == ["mean AP of an image", "evaluated mean AP", "AP of the dataset"]
    assert {len(row) for row in cells} == {11}
    assert (
        cells[6][2:5] == [f"{results[5].row.quality:.2f}", "50.00", "25.00"]
        and cells[8][3:5] == ["", ""] == cells[9][3:5]
    )
    assert cells[0][10] == "gain over the mixture" and [bool(row[10]) for row in cells[1:]] == [False] * 6 + [
        True,
        False,
        True,
    ]


def test_an_evaluation_that_is_missing_is_named(tmp_path):
    for _, kind in QUALITY_REGISTRY:
        with pytest.raises(FileNotFoundError, match=f"no {kind.result_file} .*eval-only.*{kind.switch}"):
            evaluated(tmp_path, kind)


def test_examples_are_spread_over_the_exits(derived):
    chosen = np.full(len(derived), 2)
    chosen[7], chosen[9] = 4, 6
    picked = spread_over_exits(chosen, derived, 5)
    assert len(set(picked)) == 5 and {7, 9} <= set(picked)
    assert chosen[picked].tolist() == [2, 2, 2, 4, 6]
    assert len(spread_over_exits(chosen[:3], derived.subset(range(3)), 6)) == 3


def test_pictures_have_the_datasets_colours_and_turned_photos(tmp_path):
    """No category has a colour, and the photo is rotated by EXIF: 4 wide and 6 high when upright."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "pan").mkdir()
    Image.fromarray(np.full((6, 4, 3), (1, 0, 0), np.uint8)).save(tmp_path / "pan" / "a.png")
    segment = {"id": 1, "category_id": 5, "area": 24, "iscrowd": 0, "bbox": [0, 0, 4, 6]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 4}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [segment]}],
        "categories": [{"id": 5, "name": "five", "isthing": 1}, {"id": 2, "name": "two", "isthing": 0}],
    }
    (tmp_path / "pan.json").write_text(json.dumps(content))
    register_from_config(
        [f"name=report_own,images={tmp_path},panoptic={tmp_path / 'pan'},json={tmp_path / 'pan.json'}"]
    )
    truth = PanopticGroundTruth("report_own")
    five, two = _colors(truth)[5], _colors(truth)[2]
    assert five != two and (128, 128, 128) not in (five, two)
    output = {"panoptic_seg": (torch.ones(6, 4, dtype=torch.int32), [{"id": 1, "category_id": 0}]), "exit": 3}
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1}
    image, (real, drawn), k = _predict(lambda batch: [output], lambda record: record, truth, record)
    np.testing.assert_array_equal(image, np.rot90(pixels, -1))
    assert k == 3 and real.shape == drawn.shape == (6, 4, 3)
    np.testing.assert_array_equal(real, drawn)
