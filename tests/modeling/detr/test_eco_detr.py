"""DETR with early exits: what must be equal to the parent, to a shallower parent, and to one image at a time."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from minis import DETR, ECO_DETR, make_batch

from eco_m2f.budget import Gate
from eco_m2f.derived import parent_sha256
from eco_m2f.modeling.detr.detr import padded_tokens
from eco_m2f.modeling.detr.postprocessing import BoxPostProcessor

EXITS = [2, 3, 4, 5, 6]
SIZES = ((96, 160), (60, 70))  # the second is padded to the first


@pytest.fixture(scope="module")
def parent(build_mini, fill_weights):
    return fill_weights(build_mini(DETR))


@pytest.fixture(scope="module")
def eco(build_mini, parent):
    model = build_mini(ECO_DETR)
    model.load_state_dict(parent.state_dict(), strict=True)
    return model


def same(a: dict, b: dict) -> bool:
    a, b = a["instances"], b["instances"]
    return all(torch.equal(a.get(name), b.get(name)) for name in ("scores", "pred_classes")) and torch.equal(
        a.pred_boxes.tensor, b.pred_boxes.tensor
    )


@torch.no_grad()
def test_exit_6_alone_is_bit_equal_to_the_parent(build_mini, parent):
    model = build_mini(ECO_DETR, "MODEL.ECO.EXITS", [6], "MODEL.ECO.EXITS_PER_STEP", 1)
    model.load_state_dict(parent.state_dict(), strict=True)
    batch = make_batch(SIZES)
    for ours, theirs in zip(model(batch), parent(batch)):
        assert same(ours, theirs) and ours["exit"] == 6
    gradients, losses = [], []
    for m in (model.train(), copy.deepcopy(parent).train()):
        with EventStorage(0), torch.enable_grad():
            losses.append(m(batch))
            sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 9
    assert all(torch.equal(losses[0][n], losses[1][n]) for n in losses[0])
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("k", EXITS)
@torch.no_grad()
def test_forced_exit_equals_a_parent_with_k_layers(build_mini, parent, eco, k):
    shallow = build_mini(DETR, "MODEL.DETR.ENC_LAYERS", k)
    shallow.load_state_dict({n: v for n, v in parent.state_dict().items() if n in shallow.state_dict()}, strict=True)
    features = eco.extract(eco.preprocess(make_batch(SIZES)))
    ours, theirs = eco.head.forward_exits(features, EXITS)[k], shallow.head(features)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_one_image_at_a_time(eco):
    """Padding goes with its image into its group. In float64, so that the order of summing does not show."""
    eco = copy.deepcopy(eco).double()
    torch.manual_seed(0)
    channels = eco.backbone.output_shape()["res5"].channels
    sizes = [(96, 160), (60, 70), (96, 33), (40, 160), (64, 64)]
    x = torch.randn(5, channels, 3, 5, dtype=torch.float64)
    features = {"res5": x, "padding": padded_tokens(x, sizes)}
    exits = [2, 6, 3, 2, 5]
    together = eco.predict(features, exits)
    assert set(together) == {"pred_logits", "pred_boxes"}
    for i, k in enumerate(exits):
        alone = eco.predict({n: f[i : i + 1] for n, f in features.items()}, [k])
        for name in together:
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-9, rtol=1e-9)


def test_an_image_covers_its_tokens_and_no_others():
    padding = padded_tokens(torch.zeros(3, 1, 3, 5), [(96, 160), (64, 65), (1, 1)])
    assert (~padding).flatten(1).sum(1).tolist() == [15, 2 * 3, 1]
    assert not padding[1, :2, :3].any()


def test_eq3_loss_is_the_weighted_sum_over_exits(eco):
    model, batch = copy.deepcopy(eco).train(), make_batch(SIZES)
    with EventStorage(0):
        losses = model(batch)
    assert {"loss_ce", "loss_bbox_1", "exit2/loss_giou", "exit5/loss_bbox_0"} <= losses.keys()
    assert len(losses) == 5 * 9
    images = model.preprocess(batch)
    targets = model.prepare_targets(batch, images.tensor.shape[-2:])
    preds = model.head.forward_exits(model.extract(images), EXITS)
    for k in EXITS:
        for name, value in model.weighted_losses(preds[k], targets, model.count_masks(targets)).items():
            key = name if k == 6 else f"exit{k}/{name}"
            torch.testing.assert_close(losses[key], value * k / 6, atol=1e-5, rtol=1e-5)


def gradients(model, recompute: bool) -> tuple[dict, dict]:
    model = copy.deepcopy(model).train().double()
    model.recompute = recompute
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch(SIZES))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_decoding_again_changes_neither_losses_nor_gradients(build_mini, eco):
    """With dropout: the second pass draws what the first one drew."""
    model = build_mini(ECO_DETR, "MODEL.DETR.DROPOUT", 0.3)
    model.load_state_dict(eco.state_dict())
    (joint_losses, joint), (losses, again) = gradients(model, False), gradients(model, True)
    assert losses.keys() == joint_losses.keys() and again.keys() == joint.keys()
    for name in joint_losses:
        torch.testing.assert_close(losses[name], joint_losses[name], atol=0, rtol=0)
    for name in joint:
        torch.testing.assert_close(again[name], joint[name], atol=1e-12, rtol=1e-9)


def test_targets_are_in_parts_of_the_image_not_of_the_batch(parent):
    batch = make_batch(SIZES)
    targets = parent.prepare_targets(batch, (96, 160))
    for x, target in zip(batch, targets):
        x0, y0, x1, y1 = x["instances"].gt_boxes.tensor.unbind(1)
        wanted = torch.stack([(x0 + x1) / 2 / x["width"], (y0 + y1) / 2 / x["height"]], 1)
        torch.testing.assert_close(target["boxes"][:, :2], wanted)
        torch.testing.assert_close(target["boxes"][:, 2], (x1 - x0) / x["width"])
        assert torch.equal(target["labels"], x["instances"].gt_classes)


@pytest.mark.parametrize("source", ["res5", "projected"])
@torch.no_grad()
def test_a_gate_leads_to_the_fixed_exit_and_belongs_to_its_weights(build_mini, eco, tmp_path, source):
    gated = build_mini(ECO_DETR, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", source)
    fixed = build_mini(ECO_DETR, "MODEL.ECO.EXIT", 3)
    for model in (gated, fixed):
        model.load_state_dict(eco.state_dict(), strict=True)
    channels = 32 if source == "projected" else eco.backbone.output_shape()["res5"].channels
    bias = torch.tensor([float(k == 3) for k in EXITS])
    sha = parent_sha256(eco.state_dict())
    Gate(torch.zeros(5, channels), bias, tuple(EXITS), 0.001, "hard_ce", source, sha).save(tmp_path / "gate.pth")
    gated.load_gate(str(tmp_path / "gate.pth"))
    batch = make_batch(SIZES)
    for a, b in zip(gated(batch), fixed(batch)):
        assert same(a, b) and a["exit"] == b["exit"] == 3 and a["exit_gflops"] == b["exit_gflops"]
    other = build_mini(ECO_DETR, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", source)
    with pytest.raises(ValueError, match="fitted for parent weights"):
        other.load_gate(str(tmp_path / "gate.pth"))


@torch.no_grad()
def test_results_tell_exit_cost_and_boxes_of_the_wanted_size(eco):
    batch = make_batch(SIZES)
    batch[1]["height"], batch[1]["width"] = 600, 700
    first, second = eco(batch)
    assert first["exit"] == 6 and first["exit_gflops"] == eco.costs((96, 160), (96, 160))[6]
    encoders = [eco.costs((96, 160), (96, 160))[k]["encoder"] for k in EXITS]
    assert encoders == pytest.approx([k * encoders[0] / 2 for k in EXITS])  # the layers and nothing else
    found = second["instances"]
    assert found.image_size == (600, 700) and len(found) == 12
    assert found.pred_boxes.tensor[:, 2].max() <= 700 and found.pred_boxes.tensor[:, 3].max() <= 600
    assert found.pred_boxes.tensor.max() > 200  # in pixels of that size
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_detections_by_hand():
    logits = torch.tensor([[2.0, 0.0, 5.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])  # the last column: no object
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 0.5], [0.25, 0.5, 0.5, 1.0]])
    found = BoxPostProcessor(detections_per_image=2)(logits, boxes, (100, 200))
    assert found.pred_classes.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, logits[1:].softmax(-1)[[0, 1], [1, 0]])
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[140.0, 25, 200, 75], [0, 0, 100, 100]]))


def test_exits_that_the_encoder_does_not_have_are_refused(build_mini):
    with pytest.raises(ValueError, match="lies beyond"):
        build_mini(ECO_DETR, "MODEL.DETR.ENC_LAYERS", 4)


def test_a_backbone_without_a_fitting_res5_is_refused(build_mini):
    with pytest.raises(ValueError, match="res5, which is not among"):
        build_mini(DETR, "MODEL.RESNETS.OUT_FEATURES", ["res4"])
    with pytest.raises(ValueError, match="stride 16"):
        build_mini(DETR, "MODEL.RESNETS.RES5_DILATION", 2)
