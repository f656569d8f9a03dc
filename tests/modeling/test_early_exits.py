"""Exits of each parent and encoder: equal to the parent, to a shallower parent, and to one image at a time."""

import copy
import functools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from detectron2.utils.events import EventStorage
from minis import CONFIGS, DETR, ECO, ECO_DETR, LITE, MASKFORMER, MINI, PARENT, PROSCALE, RT, build, fill, make_batch

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.costs import ExitCosts, padded_size
from eco_m2f.engine.optimizer import autocast, build_optimizer
from eco_m2f.engine.predict import load_gate
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.engine.step import Step
from eco_m2f.evaluation.exit_statistics import ExitStatistics
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow

SIZES = ((64, 96), (30, 70))  # the second is padded to the first; half of its tokens are padding for DETR


@dataclass(frozen=True, eq=False)
class System:
    """A parent and its variant with exits: configs, options and exits. If exit k equals a parent of k layers, also the
    config key of the number of layers."""

    parent: str
    eco: str
    opts: tuple = ()
    exits: tuple[int, ...] = (2, 3, 4, 5, 6)
    layers: str = ""

    @property
    def last(self) -> int:
        return self.exits[-1]

    def build_eco(self, *opts, exits: tuple[int, ...] | None = None):
        return build(self.eco, *self.opts, *eco_opts(*(exits or self.exits)), *opts)

    @functools.cache
    def models(self):
        """(parent, variant with exits), with the same weights."""
        eco = fill(self.build_eco())
        parent = build(self.parent, *self.opts)
        parent.load_state_dict(eco.state_dict(), strict=True)
        return parent, eco

    def twin(self, *opts, **exits):
        """Another variant with exits, with the same weights."""
        model = self.build_eco(*opts, **exits)
        model.load_state_dict(self.models()[1].state_dict(), strict=True)
        return model


def eco_opts(*exits: int) -> tuple:
    return (
        *("MODEL.ECO.EXITS", exits, "MODEL.ECO.EXITS_PER_STEP", len(exits)),
        *("MODEL.ECO.EXIT", exits[-1], "MODEL.ECO.MAX_EXIT", exits[-1]),
    )


DROPOUT = ("MODEL.DETR.DROPOUT", 0.3, "MODEL.MASK_FORMER.DROPOUT", 0.3)
STAGES = ("MODEL.PROSCALE.STAGES", (1, 1, 1), "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 3)
SYSTEMS = {
    "m2f": System(PARENT, ECO, layers="MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "lite": System(PARENT, ECO, LITE),
    "proscale, last stage": System(PARENT, ECO, PROSCALE, (5, 6)),
    "proscale, all stages": System(
        PARENT, ECO, (*PROSCALE, *STAGES, "MODEL.PROSCALE.EXIT_AFTER_STAGES", True), (1, 2, 3)
    ),
    "maskformer": System(PARENT, ECO, MASKFORMER, layers="MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "detr": System(DETR, ECO_DETR, layers="MODEL.DETR.ENC_LAYERS"),
}
each_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
PARENTS = ("m2f", "maskformer", "detr")
each_parent = pytest.mark.parametrize("system", [SYSTEMS[name] for name in PARENTS], ids=PARENTS)


def same(a: dict, b: dict) -> bool:
    """Whether two results are equal, bit for bit."""
    pairs = [(a["instances"].get(n), b["instances"].get(n)) for n in ("scores", "pred_classes")]
    pairs.append((a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor))
    if "sem_seg" in a:
        pairs += [(a["sem_seg"], b["sem_seg"]), (a["panoptic_seg"][0], b["panoptic_seg"][0])]
        if a["panoptic_seg"][1] != b["panoptic_seg"][1]:
            return False
    return a.keys() - {"exit"} == b.keys() - {"exit"} and all(torch.equal(x, y) for x, y in pairs)


def step(model, double: bool = False) -> tuple[dict, dict]:
    """Losses and gradients of a training step, always with the same random points."""
    model = copy.deepcopy(model).train()
    if double:
        model.double()
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch(SIZES))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_all_close(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=1000 * tolerance)


# --- the parent ------------------------------------------------------------------------------------------------------


@each_system
@torch.no_grad()
def test_the_last_exit_is_bit_equal_to_the_parent(system):
    parent, eco = system.models()
    for model in (eco, system.twin(exits=(system.last,))):
        for ours, theirs in zip(model(make_batch(SIZES)), parent(make_batch(SIZES))):
            assert same(ours, theirs) and ours["exit"] == system.last


@each_system
def test_the_last_exit_alone_trains_bit_equal_to_the_parent(system):
    (losses, gradients), (wanted, of_parent) = step(system.twin(exits=(system.last,))), step(system.models()[0])
    assert losses.keys() == wanted.keys() and all(torch.equal(losses[n], wanted[n]) for n in wanted)
    assert gradients.keys() == of_parent.keys() and len(gradients) > 100
    assert all(torch.equal(gradients[n], of_parent[n]) for n in gradients)


@each_parent
@torch.no_grad()
def test_forced_exit_equals_a_parent_with_k_layers(system):
    parent, eco = system.models()
    features = eco.extract(eco.preprocess(make_batch(SIZES)))
    of_exit = eco.head.forward_exits(features, system.exits)
    for k in system.exits:
        shallow = build(system.parent, *system.opts, system.layers, k)
        shallow.load_state_dict({n: v for n, v in parent.state_dict().items() if n in shallow.state_dict()})
        assert_all_close(of_exit[k], shallow.head(features), 1e-5)


@each_parent
@torch.no_grad()
def test_auxiliary_outputs_are_made_in_training_alone(system):
    """Inference computes nothing for them: it predicts classes once."""
    eco = copy.deepcopy(system.models()[1])
    calls = []
    getattr(eco.head, "predictor", eco.head).class_embed.register_forward_hook(lambda *_: calls.append(1))
    features = eco.extract(eco.preprocess(make_batch(SIZES)))
    assert "aux_outputs" not in eco.head(features) and len(calls) == 1
    trained = eco.head.train()(features)
    assert 2 <= len(trained["aux_outputs"]) == len(calls) - 2


# --- one batch, several exits ----------------------------------------------------------------------------------------


@each_system
@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_one_image_at_a_time(system):
    """In float64, where the order of summation in a batch does not matter."""
    eco = copy.deepcopy(system.models()[1]).double()
    chosen = [system.exits[0], system.last, system.exits[1], system.exits[0], system.exits[-2]]
    batch = make_batch(((64, 96), (30, 70), (64, 20), (64, 96), (33, 96)))
    features = eco.extract(eco.preprocess(batch))
    together = eco.predict(features, chosen)
    assert "pred_logits" in together and len(together) == 2
    for i, k in enumerate(chosen):
        alone = eco.predict({n: f[i : i + 1] for n, f in features.items()}, [k])
        assert_all_close({n: together[n][i] for n in together}, {n: alone[n][0] for n in together}, 1e-9)
    first = {n: f[:1] for n, f in features.items()}
    of_exit = [eco.predict(first, [k])["pred_logits"] for k in system.exits]
    assert not any(torch.allclose(a, b) for a, b in zip(of_exit, of_exit[1:]))


@each_system
@torch.no_grad()
def test_exits_of_a_single_image_are_decoded_at_once_as_each_alone(system, monkeypatch):
    eco = copy.deepcopy(system.models()[1]).double()
    features = eco.extract(eco.preprocess(make_batch(SIZES[:1])))
    original, calls = eco.head.decode, []
    monkeypatch.setattr(eco.head, "decode", lambda *a, **kw: calls.append(a) or original(*a, **kw))
    together = eco.head.forward_exits(features, system.exits)
    assert len(calls) == 1
    for k in system.exits:
        assert_all_close(together[k], eco.head.forward_exits(features, [k])[k], 1e-9)
    first, last = (together[k]["pred_logits"] for k in (system.exits[0], system.last))
    assert not torch.allclose(first, last, atol=1e-2)


@each_system
@torch.no_grad()
def test_no_image_runs_a_layer_that_it_does_not_need(system):
    eco = copy.deepcopy(system.models()[1])
    rows = []
    for name, layer in eco.named_modules():
        if re.search(r"transformer\.encoder\.layers\.\d+$", name):
            layer.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    chosen = [system.exits[0], system.exits[1], system.exits[0]]
    eco.predict(eco.extract(eco.preprocess(make_batch(((64, 64),) * 3))), chosen)
    assert sum(rows) == sum(chosen)


@each_system
@torch.no_grad()
def test_results_tell_exit_and_cost(system):
    eco, (first, last) = copy.deepcopy(system.models()[1]), (system.exits[0], system.last)
    eco.exit_policy.forward = lambda features, sizes, image_ids: torch.tensor([first, last])
    results = eco(make_batch(SIZES))
    assert [r["exit"] for r in results] == [first, last]
    assert all(r["sem_seg"].isfinite().all() for r in results if "sem_seg" in r)
    assert results[0].keys() - system.models()[0](make_batch(SIZES))[0].keys() == {"exit"}  # nothing is counted
    table = ExitCosts(eco)
    costs, small = table(SIZES[0], SIZES[0]), table(SIZES[0], SIZES[1])
    for x, result, size, k in zip(make_batch(SIZES), results, SIZES, (first, last)):
        alone = table(padded_size(size, eco.size_divisibility), size)[k]
        assert ExitStatistics(table).row(x, result) == (k, alone["total"], alone["encoder"])
    # results are resized to the image's own size, which boxes are not
    assert (small[last]["total"] < costs[last]["total"]) == ("sem_seg" in results[0])
    for part in ("total", "encoder"):
        values = [costs[k][part] for k in system.exits]
        assert values == sorted(values) and len(set(values)) == len(values)
        if system.layers:
            layer = values[1] - values[0]
            assert values == pytest.approx([values[0] + i * layer for i in range(len(values))])


def sensitive(system: System, tmp_path):
    """A gated model in float64 whose exits depend on small differences of the features."""
    eco = system.twin("MODEL.ECO.POLICY", "LinearGate")
    channels = eco.backbone.output_shape()["res5"].channels
    weight = 10 * torch.randn(len(system.exits), channels, generator=torch.Generator().manual_seed(2))
    path, sha = tmp_path / "gate.pth", parent_sha256(eco.state_dict())
    Gate(weight, torch.zeros(len(system.exits)), system.exits, 0.0, "hard_ce", "res5", sha).save(path)
    load_gate(eco, str(path))
    return eco.double()


@pytest.mark.parametrize("system", [SYSTEMS[name] for name in ("m2f", "detr")], ids=("m2f", "detr"))
@torch.no_grad()
def test_what_an_image_gets_depends_on_the_size_of_its_batch_alone(system, tmp_path):
    """As the guide and early_exits.py say: the other images do not matter, but the padded size does."""
    eco = sensitive(system, tmp_path)
    small, large = make_batch(((30, 70), (64, 96)))
    other = {**large, "image": 255 - large["image"]}
    first, second = eco([small, large])[0], eco([small, other])[0]
    assert first["exit"] == second["exit"]
    assert_all_close(numbers_of(first), numbers_of(second), 1e-9)

    def pooled(batch):
        images = eco.preprocess(batch)
        return eco.pooled_feature(eco.extract(images), images.image_sizes, "res5")

    torch.testing.assert_close(pooled([small, large])[0], pooled([small, other])[0], atol=1e-12, rtol=1e-9)
    assert not torch.allclose(pooled([small, large])[0], pooled([small])[0], atol=1e-6)  # padding reaches the features
    blank = {**small, "image": torch.zeros(3, 30, 70, dtype=torch.uint8)}
    for alone, mate in ((small, blank), (large, {**other, "image": other["image"][:, :40, :90]})):
        together = eco([alone, mate])[0]  # padded as each would be alone
        assert together["exit"] == eco([alone])[0]["exit"]
        assert_all_close(numbers_of(together), numbers_of(eco([alone])[0]), 1e-9)


def numbers_of(result: dict) -> dict:
    found = {"scores": result["instances"].scores, "boxes": result["instances"].pred_boxes.tensor}
    return {**found, "sem_seg": result["sem_seg"]} if "sem_seg" in result else found


# --- Step A ----------------------------------------------------------------------------------------------------------


@each_system
def test_eq3_loss_is_the_weighted_sum_over_exits(system):
    """Eq. 3 with alpha_k = k / K: names and values of the losses of each exit."""
    model = copy.deepcopy(system.models()[1]).train()
    losses, _ = step(model)
    torch.manual_seed(0)  # the same draws of points, exit by exit, without weights
    batch = make_batch(SIZES)
    images = model.preprocess(batch)
    targets = model.prepare_targets(batch, images.tensor.shape[-2:])
    preds = model.head.forward_exits(model.extract(images), system.exits)
    expected = {}
    for k in system.exits:
        prefix = "" if k == system.last else f"exit{k}/"
        plain = model.weighted_losses(preds[k], targets, model.count_masks(targets))
        expected |= {prefix + name: value * k / system.last for name, value in plain.items()}
    assert len(losses) == len(system.exits) * len(model.criterion.weight_dict)
    assert {"loss_ce", "loss_ce_0", f"exit{system.exits[0]}/loss_ce_1"} <= losses.keys()
    assert_all_close(losses, expected, 1e-4)


@each_parent
def test_decoding_again_changes_neither_losses_nor_gradients(system):
    """Also with the parent's dropout: the second pass draws the same as the first."""
    joint, again = (
        step(system.twin(*DROPOUT, "MODEL.ECO.RECOMPUTE", recompute), double=True) for recompute in (False, True)
    )
    assert again[0].keys() == joint[0].keys() and all(torch.equal(again[0][n], joint[0][n]) for n in joint[0])
    assert_all_close(again[1], joint[1], 1e-12)


def train(config: str, opts: tuple, steps: int = 2):
    """The state of a mini model before and after steps of the trainer, and the model."""
    cfg = load_cfg(str(CONFIGS / config), [*MINI, *opts, "SOLVER.BASE_LR", 0.01, "SOLVER.AMP.ENABLED", False])
    model = fill(build_model(cfg)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(cfg, model)
    step = Step(model, [make_batch()] * steps, optimizer, precision=autocast(cfg, "cpu", False))
    step.train(0, steps)
    assert math.isfinite(step.storage.latest()["total_loss"][0])
    return before, model


def unchanged(before: dict, model, part: str) -> list[str]:
    after = model.state_dict()
    return [n for n, v in before.items() if part in n and torch.equal(v, after[n])]


@each_system
def test_a_step_of_step_a_trains_the_whole_head(system):
    before, model = train(system.eco, (*system.opts, *eco_opts(*system.exits)))
    assert unchanged(before, model, f"{model.head_name}.") == []


@pytest.mark.parametrize("config", [PARENT, ECO], ids=["parent", "eco"])
def test_rt_trains_whole_and_answers(config):
    """As an ECO model it has one exit, and accepts no others."""
    opts = (*RT, *(eco_opts(1) if config == ECO else ()))
    before, model = train(config, opts)
    assert unchanged(before, model, "pixel_decoder.") == []
    with torch.no_grad():
        results = model.eval()(make_batch())
    assert [tuple(r["sem_seg"].shape[1:]) for r in results] == [(64, 96), (60, 80)]
    assert all(r["sem_seg"].isfinite().all() for r in results)


def kept_for_backward(model, exits: list[int], recompute: bool) -> int:
    """The bytes, without weights, that the forward pass of head and losses keeps for the backward pass."""
    model = copy.deepcopy(model).train()
    model.recompute, model.exits = recompute, tuple(exits)
    model.sampler = type(model.sampler)(exits, {k: k / 6 for k in exits}, len(exits))
    images = model.preprocess(make_batch())
    targets = model.prepare_targets(make_batch(), images.tensor.shape[-2:])
    features = {n: f.detach() for n, f in model.extract(images).items()}
    storages, weights = {}, {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with EventStorage(0), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model.losses(features, targets, model.count_masks(targets))
    assert len(losses) == len(exits) * len(model.criterion.weight_dict)
    return sum(storages.values())


def test_all_exits_keep_hardly_more_memory_than_one():
    eco = SYSTEMS["m2f"].models()[1]
    one, joint = kept_for_backward(eco, [6], True), kept_for_backward(eco, [2, 3, 4, 5, 6], False)
    again = kept_for_backward(eco, [2, 3, 4, 5, 6], True)
    assert again <= 1.3 * one and again - one <= 0.1 * (joint - one)


# --- gates -----------------------------------------------------------------------------------------------------------


def gate_file(path, system: System, favourite: int, source: str = "res5") -> str:
    """A gate that always chooses `favourite`."""
    eco = system.models()[1]
    channels = 32 if source == "projected" else eco.backbone.output_shape()["res5"].channels
    bias = torch.tensor([float(k == favourite) for k in system.exits])
    weight, sha = torch.zeros(len(system.exits), channels), parent_sha256(eco.state_dict())
    Gate(weight, bias, system.exits, 0.001, "hard_ce", feature_source=source, parent_sha256=sha).save(path)
    return str(path)


@pytest.mark.parametrize("source", ["res5", "projected"])
@each_system
@torch.no_grad()
def test_a_gate_leads_to_the_fixed_exit_and_belongs_to_its_weights(system, tmp_path, source):
    gate_opts = ("MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", source)
    gated, k = system.twin(*gate_opts), system.exits[-2]
    path = gate_file(tmp_path / "gate.pth", system, k, source)
    load_gate(gated, path)
    assert gated.state_dict().keys() == system.models()[1].state_dict().keys()
    for a, b in zip(gated(make_batch(SIZES)), system.twin("MODEL.ECO.EXIT", k)(make_batch(SIZES))):
        assert same(a, b) and a["exit"] == b["exit"] == k
    with pytest.raises(ValueError, match="fitted for parent weights"):
        load_gate(system.build_eco(*gate_opts), path)


@each_parent
def test_a_learned_policy_without_weights_raises(system):
    with pytest.raises(RuntimeError, match="GATE"):
        system.build_eco("MODEL.ECO.POLICY", "LinearGate")(make_batch())


@each_parent
def test_projected_feature_reaches_the_gate(system):
    model = system.build_eco("MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", "projected")
    features = model.extract(model.preprocess(make_batch()))
    seen = model.policy_features(features, "projected")
    assert seen["projected"].shape[1] == 32 and "projected" not in features
    assert model.exit_policy.in_channels == 32


@torch.no_grad()
def test_a_gate_goes_by_the_stride_of_the_map_that_it_reads():
    """If the encoder does not read res5, "projected" comes from res4, at stride 16."""
    levels = ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res3", "res4"])
    model = build(ECO, *levels, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", "projected")
    assert model.head.coarsest == "res4" and model.exit_policy.stride == 16
    images = model.preprocess(make_batch(((64, 96), (33, 60))))
    features = model.extract(images)
    tokens = model.head.projected(features)
    assert tokens.shape[-2:] == (4, 6)
    pooled = model.pooled_feature(features, images.image_sizes, "projected")
    torch.testing.assert_close(pooled[0], tokens[0].mean((1, 2)))
    torch.testing.assert_close(pooled[1], tokens[1, :, :3, :4].mean((1, 2)))


def test_a_backbone_without_res5_needs_no_gate_that_reads_it():
    names = ["res2", "res3", "res4"]
    opts = ("MODEL.RESNETS.OUT_FEATURES", names, "MODEL.SEM_SEG_HEAD.IN_FEATURES", names)
    opts += ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res3", "res4"])
    opts += ("MODEL.MASK_FORMER.DEC_LAYERS", 3)
    assert [r["exit"] for r in build(ECO, *opts, "MODEL.ECO.EXIT", 2)(make_batch())] == [2, 2]
    with pytest.raises(
        ValueError, match=r"FEATURE res5, but the backbone yields \['projected', 'res2', 'res3', 'res4'\]"
    ):
        build(ECO, *opts, "MODEL.ECO.POLICY", "LinearGate")


# --- mistakes --------------------------------------------------------------------------------------------------------


@each_parent
def test_more_exits_than_layers_are_refused(system):
    with pytest.raises(ValueError, match="is beyond"):
        system.build_eco(system.layers, 4)


def test_exits_that_the_encoder_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"EXITS \[4, 6\] are not all among the encoder's exits \[5, 6\]"):
        build(ECO, *PROSCALE, *eco_opts(4, 6))


@pytest.mark.parametrize("alphas", [[0.2, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
def test_alpha_that_does_not_increase_is_refused(alphas):
    with pytest.raises(ValueError, match="increas"):
        build(ECO, "MODEL.ECO.ALPHA", alphas)
