"""Exits: what must be equal to the parent, to a shallower parent, and to one image at a time."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from minis import ECO, ECO_DETR, PARENT, make_batch

from eco_m2f.budget import Gate
from eco_m2f.derived import parent_sha256

EXITS = [2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def parent(build_mini, fill_weights):
    return fill_weights(build_mini(PARENT))


@pytest.fixture(scope="module")
def eco(build_mini, parent):
    model = build_mini(ECO)
    model.load_state_dict(parent.state_dict(), strict=True)
    return model


def gate_file(path, model, exits, favourite=None, weight=None):
    """A gate that always chooses `favourite`, or one with the given weight."""
    channels = model.backbone.output_shape()["res5"].channels
    weight = torch.zeros(len(exits), channels) if weight is None else weight
    bias = torch.tensor([1.0 if k == favourite else 0.0 for k in exits])
    sha = parent_sha256(model.state_dict())
    gate = Gate(weight, bias, tuple(exits), 0.001, "hard_ce", feature_source="res5", parent_sha256=sha)
    gate.save(path)
    return str(path)


def same(a: dict, b: dict) -> bool:
    return (
        torch.equal(a["sem_seg"], b["sem_seg"])
        and torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
        and a["panoptic_seg"][1] == b["panoptic_seg"][1]
        and torch.equal(a["instances"].scores, b["instances"].scores)
    )


def random_features(model, batch: int, height: int, width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    return {
        n: torch.randn(batch, s.channels, height // s.stride, width // s.stride, dtype=dtype)
        for n, s in model.backbone.output_shape().items()
    }


@torch.no_grad()
def test_exits_6_alone_is_bit_equal_to_the_parent(build_mini, parent):
    model = build_mini(ECO, "MODEL.ECO.EXITS", [6], "MODEL.ECO.EXITS_PER_STEP", 1)
    model.load_state_dict(parent.state_dict(), strict=True)
    for ours, theirs in zip(model(make_batch()), parent(make_batch())):
        assert same(ours, theirs) and ours["exit"] == 6


def test_exits_6_alone_trains_bit_equal_to_the_parent(build_mini, parent):
    model = build_mini(ECO, "MODEL.ECO.EXITS", [6], "MODEL.ECO.EXITS_PER_STEP", 1)
    model.load_state_dict(parent.state_dict(), strict=True)
    gradients, losses = [], []
    for m in (model, copy.deepcopy(parent)):
        m.train()
        torch.manual_seed(0)
        with EventStorage(0):
            losses.append(m(make_batch()))
        sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][n], losses[1][n]) for n in losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("k", EXITS)
@torch.no_grad()
def test_forced_exit_equals_a_parent_with_k_layers(build_mini, parent, eco, k):
    shallow = build_mini(PARENT, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", k)
    state = {n: v for n, v in parent.state_dict().items() if n in shallow.state_dict()}
    shallow.load_state_dict(state, strict=True)
    images = eco.preprocess(make_batch())
    features = eco.backbone(images.tensor)
    ours, theirs = eco.sem_seg_head.forward_exits(features, EXITS)[k], shallow.sem_seg_head(features)
    for name in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [ECO, ECO_DETR])
@torch.no_grad()
def test_exits_of_a_single_image_are_decoded_at_once_as_each_alone(build_mini, fill_weights, config, monkeypatch):
    model = fill_weights(build_mini(config))
    features = model.extract(model.preprocess(make_batch()[:1]))
    original, calls = model.head.decode, []
    monkeypatch.setattr(model.head, "decode", lambda *a, **kw: calls.append(a) or original(*a, **kw))
    together = model.head.forward_exits(features, EXITS)
    assert len(calls) == 1
    for k in EXITS:
        alone = model.head.forward_exits(features, [k])[k]
        assert together[k].keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[k][name], value, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(together[2]["pred_logits"], together[6]["pred_logits"], atol=1e-2)


@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_one_image_at_a_time(eco):
    """In float64, so that the order in which a batch is summed does not show."""
    eco = copy.deepcopy(eco).double()
    features = random_features(eco, 5, 64, 96)
    exits = [2, 6, 3, 2, 5]
    together = eco.predict(features, exits)
    for i, k in enumerate(exits):
        alone = eco.predict({n: f[i : i + 1] for n, f in features.items()}, [k])
        for name in ("pred_logits", "pred_masks"):
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_no_image_runs_a_layer_that_it_does_not_need(eco):
    rows = []
    layers = eco.sem_seg_head.pixel_decoder.transformer.encoder.layers
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, i=i: rows.append((i + 1, len(args[0]))))
        for i, layer in enumerate(layers)
    ]
    eco.predict(random_features(eco, 3, 64, 64), [2, 4, 2])
    for hook in hooks:
        hook.remove()
    per_layer = {i: sum(n for j, n in rows if j == i) for i in range(1, 7)}
    assert per_layer == {1: 3, 2: 3, 3: 1, 4: 1, 5: 0, 6: 0}


@pytest.mark.parametrize("k", [2, 5])
@torch.no_grad()
def test_gate_forced_to_k_is_bit_equal_to_the_fixed_exit(build_mini, eco, tmp_path, k):
    gated = build_mini(ECO, "MODEL.ECO.POLICY", "LinearGate")
    fixed = build_mini(ECO, "MODEL.ECO.EXIT", k)
    for model in (gated, fixed):
        model.load_state_dict(eco.state_dict(), strict=True)
    gated.load_gate(gate_file(tmp_path / "gate.pth", eco, EXITS, favourite=k))
    for a, b in zip(gated(make_batch()), fixed(make_batch())):
        assert same(a, b) and a["exit"] == b["exit"] == k and a["exit_gflops"] == b["exit_gflops"]


@torch.no_grad()
def test_gate_adds_nothing_to_the_parents_state(build_mini, eco, tmp_path):
    gated = build_mini(ECO, "MODEL.ECO.POLICY", "LinearGate")
    gated.load_state_dict(eco.state_dict(), strict=True)
    gated.load_gate(gate_file(tmp_path / "gate.pth", eco, EXITS, favourite=3))
    assert gated.state_dict().keys() == eco.state_dict().keys()


def test_gate_of_another_parent_is_refused(build_mini, eco, tmp_path):
    path = gate_file(tmp_path / "gate.pth", eco, EXITS, favourite=3)
    other = build_mini(ECO, "MODEL.ECO.POLICY", "LinearGate")
    with pytest.raises(ValueError, match="fitted for parent weights"):
        other.load_gate(path)


def test_a_learned_policy_without_weights_raises(build_mini):
    model = build_mini(ECO, "MODEL.ECO.POLICY", "LinearGate")
    with pytest.raises(RuntimeError, match="GATE"):
        model(make_batch())


def test_projected_feature_reaches_the_gate(build_mini, eco):
    model = build_mini(ECO, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", "projected")
    features = model.backbone(model.preprocess(make_batch()).tensor)
    seen = model.policy_features(features, "projected")
    assert seen["projected"].shape[1] == 32 and "projected" not in features
    assert model.exit_policy.in_channels == 32


def test_eq3_loss_is_the_weighted_sum_over_exits(eco):
    """Eq. 3 with alpha_k = k / K: names and values of every exit's losses."""
    model = copy.deepcopy(eco).train()
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch())
    assert {"loss_ce", "loss_mask_2", "exit2/loss_ce", "exit5/loss_dice_0"} <= losses.keys()
    assert len(losses) == 5 * 12
    # The same draws of points, exit by exit, without weights.
    torch.manual_seed(0)
    images = model.preprocess(make_batch())
    features = model.backbone(images.tensor)
    targets = model.prepare_targets(make_batch(), images.tensor.shape[-2:])
    preds = model.sem_seg_head.forward_exits(features, EXITS)
    for k in EXITS:
        plain = model.weighted_losses(preds[k], targets, model.count_masks(targets))
        for name, value in plain.items():
            key = name if k == 6 else f"exit{k}/{name}"
            torch.testing.assert_close(losses[key], value * k / 6, atol=1e-4, rtol=1e-4)


def gradients(model, recompute: bool) -> tuple[dict, dict]:
    """Losses and gradients of a training step, the same random points each time."""
    model = copy.deepcopy(model).train().double()
    model.recompute = recompute
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch())
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_decoding_again_changes_neither_losses_nor_gradients(eco):
    (joint_losses, joint), (losses, again) = gradients(eco, False), gradients(eco, True)
    assert losses.keys() == joint_losses.keys() and again.keys() == joint.keys()
    for name in joint_losses:
        torch.testing.assert_close(losses[name], joint_losses[name], atol=0, rtol=0)
    for name in joint:
        torch.testing.assert_close(again[name], joint[name], atol=1e-12, rtol=1e-9)


def kept_for_backward(model, exits: list[int], recompute: bool) -> int:
    """Bytes that the forward pass of the head and the losses keeps for the backward pass, without the weights."""
    model = copy.deepcopy(model).train()
    model.recompute, model.exits = recompute, tuple(exits)
    model.sampler = type(model.sampler)(exits, {k: k / 6 for k in exits}, len(exits))
    images = model.preprocess(make_batch())
    targets = model.prepare_targets(make_batch(), images.tensor.shape[-2:])
    features = {n: f.detach() for n, f in model.backbone(images.tensor).items()}
    storages, weights = {}, {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with EventStorage(0), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model.losses(features, targets, model.count_masks(targets))
    assert len(losses) == 12 * len(exits)
    return sum(storages.values())


def test_all_exits_keep_hardly_more_memory_than_one(eco):
    one, joint = kept_for_backward(eco, [6], True), kept_for_backward(eco, EXITS, False)
    again = kept_for_backward(eco, EXITS, True)
    assert again <= 1.3 * one and again - one <= 0.1 * (joint - one)


def test_exits_that_the_encoder_does_not_have_are_refused(build_mini):
    with pytest.raises(ValueError, match="lies beyond"):
        build_mini(ECO, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 4)


@pytest.mark.parametrize("alphas", [[0.2, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
def test_alpha_that_does_not_increase_is_refused(build_mini, alphas):
    with pytest.raises(ValueError, match="increas"):
        build_mini(ECO, "MODEL.ECO.ALPHA", "list", "MODEL.ECO.ALPHA_LIST", alphas)


@torch.no_grad()
def test_results_tell_exit_and_cost(eco):
    results = eco(make_batch())
    assert [r["exit"] for r in results] == [6, 6]
    costs = eco.costs((64, 96), (64, 96))
    assert results[0]["exit_gflops"] == costs[6]
    small = eco.costs((64, 96), (60, 80))[6]  # the second image's results are resized to its own size
    assert results[1]["exit_gflops"] == small and small["total"] < costs[6]["total"]
    totals, encoders = ([costs[k][part] for k in EXITS] for part in ("total", "encoder"))
    assert totals == sorted(totals) and len(set(totals)) == 5
    layer = encoders[1] - encoders[0]
    assert encoders == pytest.approx([encoders[0] + i * layer for i in range(5)])
