"""AP of an image's masks against COCOeval on that image alone."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from qualities import Case

from eco_m2f.quality import MaskAP
from eco_m2f.quality.average_precision import coco_of, encode, result_set


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(MaskAP, tmp_path_factory.mktemp("masks"))


def summary_of(case: Case, x: dict, how: str) -> float:
    """AP of one image as COCOeval prints it."""
    truth = case.quality.truth
    image = {"id": x["image_id"], "height": x["height"], "width": x["width"]}
    packed = case.prepared(x, how)
    detections = [
        {"image_id": x["image_id"], "category_id": truth.panoptic.dataset_id[c], "segmentation": encode(m), "score": s}
        for m, c, s in zip(packed.masks(), packed.classes, packed.scores)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_of([image], truth.things, truth.image(x["image_id"]).objects((x["height"], x["width"])))
        evaluation = COCOeval(coco, result_set(coco, detections), "segm")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return float(evaluation.stats[0])


def test_an_image_is_a_dataset_of_one(case):
    values = [case.compared(x, "noisy")[0][0] for x in case.shown]
    assert values == pytest.approx([summary_of(case, x, "noisy") for x in case.shown])
    assert len(set(values)) > 1 and 0 < max(values) < 1


def test_the_things_alone_are_sent_at_a_bit_a_pixel(case):
    x = case.shown[0]
    packed = case.prepared(x, "right")
    labels, masks = case.annotated(x)
    assert set(packed.classes) <= set(case.quality.truth.thing_classes)
    assert packed.bits.shape == (len(packed.classes), x["height"], -(-x["width"] // 8))
    best = int(np.argmax(packed.scores))
    assert any(np.array_equal(packed.masks()[best], m.numpy()) for c, m in zip(labels, masks))


def test_cityscapes_is_refused(case):
    metadata = case.truth.metadata
    kind = metadata.evaluator_type
    metadata.__dict__["evaluator_type"] = "cityscapes_panoptic_seg"
    try:
        with pytest.raises(ValueError, match="evaluated by Cityscapes' own AP: choose PanopticQuality or MeanIoU"):
            MaskAP.of(case.dataset)
    finally:
        metadata.__dict__["evaluator_type"] = kind
