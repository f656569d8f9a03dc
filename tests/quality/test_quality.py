"""The contract of QUALITY_REGISTRY, checked for every member."""

import csv
import json
import pickle
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from qualities import Case, whole_way

from eco_m2f.data.parallel import map_in_workers
from eco_m2f.derived.schema import named_in_provenance
from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.quality import QUALITY_REGISTRY, quality_named, quality_of_model
from eco_m2f.quality.statistics import total_statistics

MEMBERS = dict(QUALITY_REGISTRY)
HOWS = ("right", "noisy", "wrong", "nothing")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{key of a member: its `Case`}."""
    return cache(lambda key: Case(MEMBERS[key], tmp_path_factory.mktemp("quality")))


@pytest.fixture(params=MEMBERS)
def case(cases, request):
    return cases(request.param)


def test_a_member_says_what_tables_and_files_need(case):
    kind = case.kind
    assert quality_named(kind.name) is kind
    assert kind.annotation in ("panoptic", "boxes") and kind.columns and kind.evaluated_columns
    assert (kind.exact is None) == (set(kind.columns) == {"quality"})
    assert all({"id", *kind.category_keys} <= set(c) for c in case.quality.categories)
    assert len({c["id"] for c in case.quality.categories}) == len(case.quality.categories)


def test_the_annotation_itself_is_best_and_another_class_is_worst(case):
    for x in case.shown:
        (right, _), (noisy, _), (wrong, _) = case.compared(x, "right", "noisy", "wrong")
        assert right == pytest.approx(1.0) and wrong == 0.0 <= noisy < right
    assert any(case.compared(x, "noisy")[0][0] > 0 for x in case.shown)


def test_an_empty_prediction_is_no_better_than_one_of_another_class(case):
    """Except with class 0: a class map without any score is class 0."""
    for x in case.shown:
        (nothing, _), (right, _) = case.compared(x, "nothing", "right")
        class_0 = "sem_seg_file_name" in case.kind.files and 0 in case.annotated(x)[0]
        assert nothing == 0.0 or (class_0 and nothing < 0.5 * right)


def test_the_order_of_exits_does_not_matter(case):
    for x in case.inputs:
        forwards, backwards = case.compared(x, *HOWS), case.compared(x, *reversed(HOWS))
        assert [q for q, _ in forwards] == [q for q, _ in reversed(backwards)]
        assert [q for q, _ in forwards] == [case.compared(x, how)[0][0] for how in HOWS]


def test_an_image_in_which_nothing_can_be_found_has_quality_0(case):
    assert [q for q, _ in case.compared(case.inputs[-1], "right", "wrong", "nothing")] == [0.0] * 3


@pytest.mark.slow
def test_another_process_finds_the_same(case):
    x = case.shown[0]
    comparison, predictions = case.quality.comparison(x), [case.prepared(x, how) for how in HOWS]
    (there,), here = map_in_workers(comparison, [predictions], 1), comparison(predictions)
    assert [q for q, _ in there] == [q for q, _ in here]
    for (_, a), (_, b) in zip(there, here):
        assert (a is None and b is None) or all(np.array_equal(v, vars(b)[name]) for name, v in vars(a).items())


def test_the_dataset_has_what_an_evaluation_of_the_model_finds(case, tmp_path):
    """The evaluator writes the quality of the summed statistics, or else the mean over the images."""
    evaluators = evaluators_for(case.dataset, str(tmp_path))
    found = []
    for x, how in zip(case.inputs, ("noisy", "right", "noisy", "wrong")):
        output = case.model.postprocess(case.head_says(x, how), case.model.preprocess([x]), [x])
        evaluators.process([x], output)
        found += case.compared(x, how)
    evaluators.evaluate()
    assert not evaluators.failures
    written = case.kind.evaluated(json.loads((tmp_path / case.dataset / case.kind.result_file).read_text()))
    assert list(written) == list(case.kind.evaluated_columns)
    mean = float(np.mean([quality for quality, _ in found]))
    values = {"quality": mean}
    if case.kind.exact:
        values = case.kind.exact(total_statistics([s for _, s in found]), case.quality.categories)
    assert list(values) == list(case.kind.columns)
    assert next(iter(written.values())) == pytest.approx(100 * next(iter(values.values())))
    assert 0.1 < mean < 0.9


def test_a_dataset_without_the_annotation_is_refused(case, cases):
    other = next(key for key, kind in MEMBERS.items() if kind.annotation != case.kind.annotation)
    with pytest.raises(ValueError, match=f"dataset '{cases(other).dataset}' has n"):
        case.kind.of(cases(other).dataset)


def test_a_model_of_another_kind_is_refused(case):
    key = next(k for k, kind in MEMBERS.items() if kind is case.kind)
    assert quality_of_model(key, case.model) is case.kind
    other = SimpleNamespace(annotation="panoptic" if case.boxes else "boxes")
    with pytest.raises(ValueError, match=f"{key} needs a model of {case.kind.annotation}: .* set it to one of"):
        quality_of_model(key, other)


@pytest.mark.slow
@pytest.mark.parametrize("key", MEMBERS)
def test_step_b_a_gate_and_the_report(key, tmp_path):
    check_whole_way(key, MEMBERS[key], tmp_path)


def check_whole_way(key, kind, base):
    """The frontier rows of Step C equal the evaluation of the model, in the quality's columns."""
    derived, run = whole_way(key, kind, base)
    assert derived.quality_kind is kind and derived.has_statistics == (kind.exact is not None)
    rows = list(csv.DictReader((run / "table.csv").open()))
    assert [r["policy"] for r in rows] == ["fixed"] * 10 + ["gate", "mixture", "oracle"]
    column, evaluated = next(iter(kind.columns)), next(iter(kind.evaluated_columns))
    for row in (rows[9], rows[10]):  # everyone at the last exit, and the gate
        assert float(row[evaluated]) == pytest.approx(float(row[column]), abs=1e-6) and float(row[column]) > 1
    assert not any(row[evaluated] for row in (*rows[:9], *rows[11:]))
    head = (run / "table.md").read_text().splitlines()[0]
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    assert titles[2:-6] == [*kind.columns.values(), *kind.evaluated_columns.values()]
    for name in (f"{kind.name.lower()}_gflops", "exits", "predictions"):
        with Image.open(run / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_names_that_are_not_known_are_refused_with_those_that_are():
    with pytest.raises(ValueError, match="'IoU' is not one of AP, PQ, mIoU, mask_AP: import"):
        quality_named("IoU")
    with pytest.raises(ValueError, match="MODEL.ECO.QUALITY IoU is not known: for .* MaskAP, MeanIoU, PanopticQuality"):
        quality_of_model("IoU", SimpleNamespace(annotation="panoptic"))


def test_the_name_of_pq_is_not_written():
    assert named_in_provenance("PQ") == {} and named_in_provenance("mIoU") == {"measure": "mIoU"}


def test_predictions_are_on_the_host_and_small(case):
    """Less than a byte per pixel and class, the size of a map of scores."""
    x = case.shown[0]
    size = len(pickle.dumps(case.prepared(x, "right")))
    assert size < x["height"] * x["width"] * (1 + len(case.quality.categories)) and torch.is_tensor(x["image"])
