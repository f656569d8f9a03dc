"""Step A: the losses of several exits."""

import copy
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from early_exit_systems import (
    SIZES,
    SYSTEMS,
    assert_all_close,
    each_parent,
    each_system,
    eco_opts,
    step,
)
from minis import CONFIGS, ECO, MINI, PARENT, RT, fill, make_batch

from eco_m2f.engine.optimizer import autocast, build_optimizer
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.engine.step import Step

pytestmark = pytest.mark.slow

DROPOUT = ("MODEL.DETR.DROPOUT", 0.3, "MODEL.MASK_FORMER.DROPOUT", 0.3)


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
