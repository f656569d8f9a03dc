"""The contract of sequential exit policies, for all of them in EXIT_POLICY_REGISTRY, on each parent."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from detectron2.structures import ImageList
from early_exit_systems import SYSTEMS, assert_all_close, each_system, same
from minis import CONFIGS, ECO, MINI, fill, make_batch
from tiny import Tiny

from eco_m2f.costs import ExitCosts
from eco_m2f.engine.datasets import build_test_loader
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.modeling.sequential_exits import images_that_leave
from eco_m2f.policies import EXIT_POLICY_REGISTRY
from eco_m2f.policies.state_change import StateChangeExit, state_change

SIZES = ((64, 96), (30, 70), (64, 20), (64, 96), (33, 96))  # padded to the first


@dataclass(frozen=True)
class Options:
    """Options with which no, all or some images leave early; `some` gets the arguments of the calls of `leaves`."""

    never: tuple
    at_once: tuple
    some: Callable[[list], tuple]


def between_two_images(seen: list) -> tuple:
    """A threshold between the changes of two images at the first exit."""
    changes = sorted(state_change(maps, before).item() for k, maps, before in seen if k == seen[0][0])
    return "MODEL.ECO.CHANGE_THRESHOLD", (changes[1] + changes[2]) / 2


POLICIES = {
    "StateChangeExit": Options(
        ("MODEL.ECO.CHANGE_THRESHOLD", 0.0), ("MODEL.ECO.CHANGE_THRESHOLD", 1e30), between_two_images
    ),
}
each_policy = pytest.mark.parametrize("name", POLICIES)


def test_every_sequential_policy_is_under_contract():
    assert set(POLICIES) == {n for n, policy in EXIT_POLICY_REGISTRY if getattr(policy, "sequential", False)}


def with_policy(system, name: str, options: tuple):
    return system.twin("MODEL.ECO.POLICY", name, *options).double()


def inputs(eco, sizes=SIZES) -> tuple[dict[str, torch.Tensor], ImageList, list[dict]]:
    """Features, images and the batch."""
    batch = make_batch(sizes)
    images = eco.preprocess(batch)
    return eco.extract(images), images, batch


def one(i: int, features: Mapping[str, torch.Tensor], images: ImageList, batch: list[dict]) -> tuple:
    """One image of a batch, with the batch's padding."""
    alone = ImageList(images.tensor[i : i + 1], images.image_sizes[i : i + 1])
    return {n: f[i : i + 1] for n, f in features.items()}, alone, batch[i : i + 1]


@torch.no_grad()
def seen_by(eco, *batch) -> list[tuple]:
    """The arguments of all calls of the policy."""
    with mock.patch.object(eco.exit_policy, "leaves", wraps=eco.exit_policy.leaves) as leaves:
        eco.choose_and_predict(*batch)
    return [call.args for call in leaves.call_args_list]


@torch.no_grad()
def mixed(system, name: str):
    """(model, batch) whose images leave at different exits."""
    eco = with_policy(system, name, POLICIES[name].never)
    batch = inputs(eco)
    return with_policy(system, name, POLICIES[name].some(seen_by(eco, *batch))), batch


@each_policy
@each_system
@torch.no_grad()
def test_a_policy_can_choose_the_first_exit_and_the_last(system, name):
    """The results are those of the fixed exit, bit for bit."""
    for options, k in ((POLICIES[name].never, system.last), (POLICIES[name].at_once, system.exits[0])):
        eco = system.twin("MODEL.ECO.POLICY", name, *options)
        assert eco.exit_policy.exits == system.exits
        for ours, fixed in zip(eco(make_batch(SIZES)), system.twin("MODEL.ECO.EXIT", k)(make_batch(SIZES))):
            assert ours["exit"] == fixed["exit"] == k and same(ours, fixed)


@each_policy
@each_system
@torch.no_grad()
def test_a_batch_of_several_exits_equals_one_image_at_a_time(system, name):
    """In float64, where the order of summation in a batch does not matter."""
    eco, batch = mixed(system, name)
    exits, together = eco.choose_and_predict(*batch)
    assert len(set(exits)) > 1 and set(exits) <= set(system.exits)
    for i, k in enumerate(exits):
        alone, pred = eco.choose_and_predict(*one(i, *batch))
        assert alone == [k] and pred.keys() == together.keys()
        assert_all_close({n: together[n][i] for n in pred}, {n: pred[n][0] for n in pred}, 1e-9)
    forced = eco.predict(batch[0], exits)
    assert_all_close(together, {n: forced[n] for n in together}, 1e-9)


@each_policy
@each_system
@torch.no_grad()
def test_layers_run_on_images_under_way_and_the_decoder_once_on_each(system, name):
    eco, batch = mixed(system, name)
    layers = []
    for path, layer in eco.named_modules():
        if re.search(r"transformer\.encoder\.layers\.\d+$", path):
            layer.register_forward_pre_hook(lambda m, args: layers.append(len(args[0])))
    with mock.patch.object(eco.head, "decode", wraps=eco.head.decode) as decode:
        exits, _ = eco.choose_and_predict(*batch)
    decoded = [len(call.args[1][0]) for call in decode.call_args_list]
    assert sum(decoded) == len(exits) and len(decoded) == len(set(exits))
    again = [len([k for k in system.exits if k < left]) for left in exits]  # Lite's last layer runs at exits before
    extra = sum(again) if "lite" in str(system.opts).lower() else 0
    assert sum(layers) == sum(exits) + extra


@each_policy
@each_system
@torch.no_grad()
def test_padding_does_not_matter(system, name):
    """A policy gets only an image's own tokens, so the encoder's results in the padding do not matter."""
    eco, (features, images, batch) = mixed(system, name)
    shapes = eco.backbone.output_shape()
    strides = [shapes[n].stride for n in eco.head.encoder_features]
    cells = [[(math.ceil(h / s), math.ceil(w / s)) for s in strides] for h, w in images.image_sizes]
    first = seen_by(eco, features, images, batch)[: len(cells)]
    for wanted, (k, maps, before) in zip(cells, first, strict=True):
        assert k == system.exits[0]
        assert [tuple(m.shape[1:]) for m in maps] == [tuple(m.shape[1:]) for m in before] == wanted
    _, before, run = eco.head.start(features)
    _, maps = eco.head.advance(run, system.exits[0])
    leaves = images_that_leave(eco.exit_policy, system.exits[0], maps, before, cells)
    soiled = (with_padding_of_nan(state, cells) for state in (maps, before))
    assert torch.equal(images_that_leave(eco.exit_policy, system.exits[0], *soiled, cells), leaves)
    assert leaves.any() and not leaves.all()


def with_padding_of_nan(maps: list[torch.Tensor], cells) -> list[torch.Tensor]:
    soiled = [torch.full_like(m, math.nan) for m in maps]
    for i, sizes in enumerate(cells):
        for new, m, (h, w) in zip(soiled, maps, sizes, strict=True):
            new[i, :, :h, :w] = m[i, :, :h, :w]
    return soiled


@each_policy
@torch.no_grad()
def test_the_padding_of_detr_does_not_matter(name):
    """Its encoder ignores padding, so whole predictions must not change."""
    eco, (features, images, batch) = mixed(SYSTEMS["detr"], name)
    padding = features["padding"]
    assert padding.any()
    soiled = {**features, "res5": torch.where(padding[:, None], 7.0, features["res5"])}
    (exits, pred), (others, other) = (eco.choose_and_predict(f, images, batch) for f in (features, soiled))
    assert exits == others and len(set(exits)) > 1
    assert_all_close(other, pred, 1e-9)


@each_policy
@pytest.mark.parametrize("let_in", [False, True])
@torch.no_grad()
def test_the_pixel_decoder_keeps_its_precision_from_exit_to_exit(name, let_in):
    """It ignores autocast unless PIXEL_DECODER_AMP is set, as in one go."""
    eco = SYSTEMS["m2f"].twin(
        *("MODEL.ECO.POLICY", name, *POLICIES[name].never, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AMP", let_in)
    )
    linear = eco.head.pixel_decoder.transformer.encoder.layers[4].linear1
    dtypes = []
    linear.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features, images, batch = inputs(eco)
        exits, pred = eco.choose_and_predict(features, images, batch)
        one_go = eco.head(features)
    assert set(exits) == {6} and dtypes == [torch.bfloat16 if let_in else torch.float32] * 2
    assert all(torch.equal(pred[n], one_go[n]) for n in pred)


@each_policy
@torch.no_grad()
def test_max_exit_is_the_last_where_images_leave(name):
    eco = SYSTEMS["m2f"].twin("MODEL.ECO.POLICY", name, *POLICIES[name].never, "MODEL.ECO.MAX_EXIT", 4)
    assert eco.exit_policy.exits == (2, 3, 4)
    assert [r["exit"] for r in eco(make_batch())] == [4, 4]


@each_policy
@pytest.mark.parametrize("kind", ["eco_maskformer2", "eco_detr"])
def test_evaluation_counts_the_exits(tmp_path, kind, name):
    tiny = Tiny(tmp_path)
    options = POLICIES[name]
    cfg = load_cfg(tiny.config(kind), ["MODEL.ECO.POLICY", name, *options.never])
    model = fill(build_model(cfg)).eval()
    seen = []
    for (x,) in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        with torch.no_grad():
            images = model.preprocess([x])
            seen += seen_by(model, model.extract(images), images, [x])
    some = options.some(sorted(seen, key=lambda arguments: arguments[0]))
    cfg = load_cfg(tiny.config(kind), ["MODEL.ECO.POLICY", name, *some])
    model.exit_policy = build_model(cfg).exit_policy
    found = evaluate(cfg, model)["exits"]
    counts = {k: v for k, v in found.items() if k.startswith("images@")}
    assert sum(counts.values()) == 3 and len(counts) > 1 and counts["images@2"] == 2
    assert found["mean_exit"] == pytest.approx(sum(int(k[7:]) * v for k, v in counts.items()) / 3)
    costs = ExitCosts(model)((64, 64), (64, 64))
    assert costs[2]["total"] < found["GFLOPs"] < costs[6]["total"]


def test_the_change_is_the_mean_over_tokens_of_that_of_each():
    old = [torch.tensor([[[3.0]], [[4.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])]  # [2, 1, 1], [2, 1, 2]
    new = [torch.tensor([[[3.0]], [[5.0]]]), torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]])]
    assert state_change(new, old).item() == pytest.approx((1 / 5 + 3 + 1) / 3)
    assert state_change(old, old).item() == 0
    padded = [torch.nn.functional.pad(m, (0, 2, 0, 1), value=math.nan) for m in new]
    cut = [m[:, :1, :w] for m, w in zip(padded, (1, 2))]
    assert torch.equal(state_change(cut, old), state_change(new, old))
    assert state_change([m.bfloat16() for m in new], [m.bfloat16() for m in old]).dtype == torch.float32
    assert state_change(new, [torch.zeros_like(m) for m in old]) > 1e30  # from nothing, anything is a large change


def test_an_image_leaves_at_a_change_below_the_threshold():
    old, new = [torch.ones(1, 2, 2)], [torch.full((1, 2, 2), 1.25)]
    for threshold, leaves in ((0.0, False), (0.25, False), (0.26, True), (math.inf, True)):
        assert StateChangeExit(threshold, (2, 6)).leaves(2, new, old).item() is leaves


@pytest.mark.parametrize("wrong", [-0.1, math.nan])
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"CHANGE_THRESHOLD must be a number >= 0, not {wrong}"):
        StateChangeExit(wrong, (2, 6))


def test_step_b_does_not_depend_on_the_threshold():
    from eco_m2f.engine.derive import model_config

    one, other = (load_cfg(str(CONFIGS / ECO), [*MINI, "MODEL.ECO.CHANGE_THRESHOLD", value]) for value in (0.1, 0.2))
    assert model_config(one) == model_config(other)
