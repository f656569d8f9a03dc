"""EcoMaskFormer on the encoders that have exits beside the parent's, and a MaskFormer on the one that has none."""

import copy
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from minis import CONFIGS, ECO, LITE, MINI, PARENT, PROSCALE, RT, build, fill, make_batch

from eco_m2f import engine


def eco_opts(*exits: int) -> tuple:
    return (
        *("MODEL.ECO.EXITS", exits, "MODEL.ECO.EXITS_PER_STEP", len(exits)),
        *("MODEL.ECO.EXIT", exits[-1], "MODEL.ECO.MAX_EXIT", exits[-1]),
    )


STAGES = ("MODEL.PROSCALE.STAGES", (1, 1, 1), "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 3)
MODELS = {  # options, exits
    "lite": (LITE, (2, 3, 4, 5, 6)),
    "proscale, last stage": (PROSCALE, (5, 6)),
    "proscale, all stages": ((*PROSCALE, *STAGES, "MODEL.PROSCALE.EXIT_AFTER_STAGES", True), (1, 2, 3)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """(options, exits, an ECO model, a parent with the same weights)."""
    opts, exits = MODELS[request.param]
    eco = fill(build(ECO, *opts, *eco_opts(*exits)))
    parent = build(PARENT, *opts)
    parent.load_state_dict(eco.state_dict(), strict=True)
    return opts, exits, eco, parent


def random_features(model, batch: int) -> dict[str, torch.Tensor]:
    """Of images of 64 x 96."""
    torch.manual_seed(0)
    shapes = {n: (s.channels, 64 // s.stride, 96 // s.stride) for n, s in model.backbone.output_shape().items()}
    return {n: torch.randn(batch, *shape, dtype=torch.float64) for n, shape in shapes.items()}


@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_one_image_at_a_time(case):
    """In float64, so that the order in which a batch is summed does not show."""
    _, exits, eco, _ = case
    eco = copy.deepcopy(eco).double()
    chosen = [exits[0], exits[-1], exits[1], exits[0]]
    features = random_features(eco, len(chosen))
    together = eco.predict(features, chosen)
    for i, k in enumerate(chosen):
        alone = eco.predict({n: f[i : i + 1] for n, f in features.items()}, [k])
        for name in ("pred_logits", "pred_masks"):
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-9, rtol=1e-9)
    first = {n: f[:1] for n, f in features.items()}
    of_exit = [eco.predict(first, [k])["pred_logits"] for k in exits]
    assert not any(torch.allclose(a, b) for a, b in zip(of_exit, of_exit[1:]))


@torch.no_grad()
def test_no_image_runs_a_layer_that_it_does_not_need(case):
    _, exits, eco, _ = case
    rows = []
    layers = eco.sem_seg_head.pixel_decoder.transformer.encoder.layers
    hooks = [layer.register_forward_pre_hook(lambda m, args: rows.append(len(args[0]))) for layer in layers]
    eco.double().predict(random_features(eco, 3), [exits[0], exits[1], exits[0]])
    eco.float()
    for hook in hooks:
        hook.remove()
    assert sum(rows) == exits[0] + exits[1] + exits[0]


@torch.no_grad()
def test_inference_tells_exits_and_their_costs(case):
    _, exits, eco, _ = case
    eco.exit_policy.forward = lambda features, sizes, image_ids: torch.tensor([exits[0], exits[-1]])
    results = eco(make_batch())
    del eco.exit_policy.forward
    assert [r["exit"] for r in results] == [exits[0], exits[-1]]
    assert all(r["sem_seg"].isfinite().all() for r in results)
    assert results[0]["exit_gflops"] == eco.costs((64, 96), (64, 96))[exits[0]]
    assert results[1]["exit_gflops"] == eco.costs((64, 96), (60, 80))[exits[-1]]
    encoder = [eco.costs((64, 96), (64, 96))[k]["encoder"] for k in exits]
    assert encoder == sorted(encoder) and len(set(encoder)) == len(exits)


@torch.no_grad()
def test_the_last_exit_is_the_parent(case):
    _, exits, eco, parent = case
    for ours, theirs in zip(eco(make_batch()), parent(make_batch())):
        assert ours["exit"] == exits[-1] and torch.equal(ours["sem_seg"], theirs["sem_seg"])
        assert ours["panoptic_seg"][1] == theirs["panoptic_seg"][1]


def train(config: str, opts: tuple, steps: int = 2):
    """A mini's state before and after steps of the trainer, and the model."""
    cfg = engine.load_cfg(str(CONFIGS / config), [*MINI, *opts, "SOLVER.BASE_LR", 0.01, "SOLVER.AMP.ENABLED", False])
    model = fill(engine.build_model(cfg)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = engine.build_optimizer(cfg, model)
    step = engine.Step(model, [make_batch()] * steps, optimizer, precision=engine.autocast(cfg, "cpu", False))
    step.train(0, steps)
    assert math.isfinite(step.storage.latest()["total_loss"][0])
    return before, model


def unchanged(before: dict, model, part: str) -> list[str]:
    after = model.state_dict()
    return [n for n, v in before.items() if part in n and torch.equal(v, after[n])]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_step_a_trains_the_whole_pixel_decoder(name):
    opts, exits = MODELS[name]
    before, model = train(ECO, (*opts, *eco_opts(*exits)))
    assert unchanged(before, model, "pixel_decoder.") == []


def test_eq3_loss_is_the_weighted_sum_over_exits(case):
    """alpha_k = k / K; the same draws of points, exit by exit, without weights."""
    _, exits, eco, _ = case
    model = copy.deepcopy(eco).train()
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch())
    torch.manual_seed(0)
    images = model.preprocess(make_batch())
    features = model.backbone(images.tensor)
    targets = model.prepare_targets(make_batch(), images.tensor.shape[-2:])
    preds = model.sem_seg_head.forward_exits(features, exits)
    expected = {}
    for k in exits:
        prefix = "" if k == exits[-1] else f"exit{k}/"
        plain = model.weighted_losses(preds[k], targets, model.count_masks(targets))
        expected |= {prefix + name: value * k / exits[-1] for name, value in plain.items()}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-4, rtol=1e-4)


def test_exits_that_the_encoder_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"EXITS \[4, 6\] are not all among the encoder's exits \[5, 6\]"):
        build(ECO, *PROSCALE, *eco_opts(4, 6))


@pytest.mark.parametrize("config", [PARENT, ECO], ids=["parent", "eco"])
def test_rt_trains_whole_and_answers(config):
    """As an ECO model it has its one exit, to which nothing can be added."""
    opts = (*RT, *(eco_opts(1) if config == ECO else ()))
    before, model = train(config, opts)
    assert unchanged(before, model, "pixel_decoder.") == []
    with torch.no_grad():
        results = model.eval()(make_batch())
    assert [tuple(r["sem_seg"].shape[1:]) for r in results] == [(64, 96), (60, 80)]
    assert all(r["sem_seg"].isfinite().all() for r in results)
