"""DETR and ECO-DETR: padding, targets and detections; exits are in tests/modeling/test_early_exits.py."""

import pytest
import torch
from minis import DETR, ECO_DETR, ECO_DETR_DC5, make_batch

from eco_m2f.costs import ExitCosts
from eco_m2f.modeling.detr.detr import padded_tokens
from eco_m2f.modeling.detr.postprocessing import BoxPostProcessor

EXITS = [2, 3, 4, 5, 6]
SIZES = ((96, 160), (60, 70))


@pytest.fixture(scope="module")
def parent(build_mini, fill_weights):
    return fill_weights(build_mini(DETR))


@pytest.fixture(scope="module")
def eco(build_mini, parent):
    model = build_mini(ECO_DETR)
    model.load_state_dict(parent.state_dict(), strict=True)
    return model


def test_an_image_covers_its_tokens_and_no_others():
    padding = padded_tokens(torch.zeros(3, 1, 3, 5), [(96, 160), (64, 65), (1, 1)], 32)
    assert (~padding).flatten(1).sum(1).tolist() == [15, 2 * 3, 1]
    assert not padding[1, :2, :3].any()


def test_targets_are_in_parts_of_the_image_not_of_the_batch(parent):
    batch = make_batch(SIZES)
    targets = parent.prepare_targets(batch, (96, 160))
    for x, target in zip(batch, targets):
        x0, y0, x1, y1 = x["instances"].gt_boxes.tensor.unbind(1)
        wanted = torch.stack([(x0 + x1) / 2 / x["width"], (y0 + y1) / 2 / x["height"]], 1)
        torch.testing.assert_close(target["boxes"][:, :2], wanted)
        torch.testing.assert_close(target["boxes"][:, 2], (x1 - x0) / x["width"])
        assert torch.equal(target["labels"], x["instances"].gt_classes)


@torch.no_grad()
def test_boxes_are_in_pixels_of_the_wanted_size(eco):
    batch = make_batch(SIZES)
    batch[1]["height"], batch[1]["width"] = 600, 700
    found = eco(batch)[1]["instances"]
    assert found.image_size == (600, 700) and len(found) == 12
    assert found.pred_boxes.tensor[:, 2].max() <= 700 and found.pred_boxes.tensor[:, 3].max() <= 600
    assert found.pred_boxes.tensor.max() > 200  # in pixels of that size
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@torch.no_grad()
def test_the_encoder_costs_its_layers_and_nothing_else(eco):
    encoders = [ExitCosts(eco)((96, 160), (96, 160))[k]["encoder"] for k in EXITS]
    assert encoders == pytest.approx([k * encoders[0] / 2 for k in EXITS])


def test_detections_by_hand():
    logits = torch.tensor([[2.0, 0.0, 5.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])  # the last column: no object
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 0.5], [0.25, 0.5, 0.5, 1.0]])
    found = BoxPostProcessor(detections_per_image=2)(logits, boxes, (100, 200))
    assert found.pred_classes.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, logits[1:].softmax(-1)[[0, 1], [1, 0]])
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[140.0, 25, 200, 75], [0, 0, 100, 100]]))


def test_a_backbone_without_res5_is_refused(build_mini):
    with pytest.raises(ValueError, match="res5, which is not among"):
        build_mini(DETR, "MODEL.RESNETS.OUT_FEATURES", ["res4"])


@torch.no_grad()
def test_a_map_of_stride_16_has_its_own_padding(build_mini, fill_weights):
    """DETR-DC5: an image gives the same in a batch as alone, and the gate knows the stride of its map."""
    model = fill_weights(build_mini(ECO_DETR_DC5)).double()
    batch = make_batch(((96, 160), (64, 80)))
    features = model.extract(model.preprocess(batch))
    assert model.backbone.output_shape()["res5"].stride == 16 and features["res5"].shape[-2:] == (6, 10)
    assert (~features["padding"]).flatten(1).sum(1).tolist() == [60, 4 * 5]
    # the backbone sees the padding, so only the head is compared, on the smaller image's own tokens
    own = {"res5": features["res5"][1:, :, :4, :5], "padding": torch.zeros(1, 4, 5, dtype=torch.bool)}
    alone, together = model.head(own, 3), model.head(features, 3)
    torch.testing.assert_close(together["pred_boxes"][1:], alone["pred_boxes"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together["pred_logits"][1:], alone["pred_logits"], rtol=1e-9, atol=1e-9)
