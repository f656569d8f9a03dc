"""Errors in configs, optimizer, schedules, mixed precision, accumulation, resuming."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from detectron2.engine import hooks
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from minis import CONFIGS, ECO, MINI, build, fill, make_batch
from PIL import Image
from tiny import Tiny, call, kept_log_handlers
from torch import nn

from eco_m2f.engine.command_line import argument_parser
from eco_m2f.engine.datasets import build_test_loader
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.optimizer import autocast, build_optimizer, gradient_clipper
from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.setup import build_model, load_cfg, setup, warn_of_keys_without_effect
from eco_m2f.engine.step import Step, check_finite, enough_values
from eco_m2f.engine.train import Trainer
from eco_m2f.evaluation.semantic import SemanticEvaluator


def load(*opts, config: str = ECO):
    return load_cfg(str(CONFIGS / config), [*MINI, *opts])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet():
    with kept_log_handlers():
        yield


def make_step(model, batches, *opts, accumulation_steps: int = 1) -> Step:
    cfg = load(*opts)
    return Step(
        model.train(),
        batches,
        build_optimizer(cfg, model),
        precision=autocast(cfg, "cpu", cfg.SOLVER.AMP.ENABLED),
        accumulation_steps=accumulation_steps,
    )


def set_scale(step: Step, scale: float) -> None:
    """The state after the first steps, which find a scale that does not overflow."""
    if step.scaler.is_enabled():
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_step_in_mixed_precision_trains(precision):
    model = fill(build(ECO))
    before = state(model)
    seen = []
    model.backbone.register_forward_hook(lambda m, x, y: seen.append(y["res5"].dtype))
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision)
    step = make_step(model, [make_batch()] * 2, *amp, "SOLVER.BASE_LR", 0.01)
    set_scale(step, 1024.0)
    step.train(0, 2)
    losses = step.storage.latest()["total_loss"][0]
    assert math.isfinite(losses) and losses > 0
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert any("encoder.layers.5" in n for n in changed) and any(n.startswith("backbone.") for n in changed)
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert set(seen) == {getattr(torch, precision)}


def test_a_float16_step_that_overflows_is_skipped_and_lowers_the_scale():
    model = fill(build(ECO))
    before = state(model)
    step = make_step(model, [make_batch()], "SOLVER.AMP.ENABLED", True)
    set_scale(step, 2.0**24)
    step.train(0, 1)
    assert step.scaler.get_scale() == 2.0**23
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_float16_gradients_are_scaled_and_clipped_by_their_true_size():
    model = fill(build(ECO))
    step = make_step(model, [make_batch()], "SOLVER.AMP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    assert step.scaler.is_enabled()
    set_scale(step, 1024.0)
    step.train(0, 1)
    norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters() if p.grad is not None))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_needs_no_scale_and_off_is_off():
    bf16 = make_step(build(ECO), [], "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")
    off = make_step(build(ECO), [], "SOLVER.AMP.ENABLED", False)
    assert not bf16.scaler.is_enabled() and not off.scaler.is_enabled()
    with off.precision:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_scale_is_resumed():
    step = make_step(build(ECO), [], "SOLVER.AMP.ENABLED", True)
    set_scale(step, 32.0)
    other = make_step(build(ECO), [], "SOLVER.AMP.ENABLED", True)
    other.load_state_dict({**step.state_dict(), "iteration": 3})
    assert other.scaler.get_scale() == 32.0 and other.iter == 3


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_evaluation_in_mixed_precision(tiny, precision):
    options = ["TEST.AMP", True, "SOLVER.AMP.PRECISION", precision]
    cfg = load_cfg(tiny.config(), options)
    model = fill(build_model(cfg)).eval()
    dtypes = set()
    model.backbone.register_forward_hook(lambda m, x, y: dtypes.add(y["res5"].dtype))
    results = evaluate(cfg, model)
    assert dtypes == {getattr(torch, precision)}
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100 and results["sem_seg"]["mIoU"] >= 0


@pytest.mark.slow
def test_several_views_are_evaluated_beside_the_image_itself(tiny, tmp_path):
    """Only mIoU. A single view at test size, not mirrored, is the image itself."""
    options = ["TEST.AUG.ENABLED", True, "OUTPUT_DIR", str(tmp_path), "TEST.AUG.MAX_SIZE", 128]
    one = ["TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False]
    cfg = load_cfg(tiny.config(), [*options, *one])
    results = evaluate(cfg, build_model(cfg).eval())
    assert set(results) == {"exits", "panoptic_seg", "sem_seg", "segm", "sem_seg_TTA"}
    assert results["sem_seg_TTA"] == pytest.approx(results["sem_seg"], nan_ok=True)
    written = json.loads((tmp_path / "inference_TTA" / tiny.dataset("val") / "results.json").read_text())
    assert set(written) == {"sem_seg"}


def test_the_predictor_gives_what_the_evaluation_sees(tiny, tmp_path):
    """The input is an array. The result has its size and the exit of the options."""
    cfg = load_cfg(tiny.config())
    model = fill(build_model(cfg)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    predict = load_predictor(tiny.config(), ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.ECO.EXIT", 4])
    x = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]
    with Image.open(x["file_name"]) as image:
        result = predict(np.asarray(image.convert("RGB")))
    model.exit_policy.exits = (4,)
    with torch.no_grad():
        wanted = model([x])[0]
    assert result["exit"] == wanted["exit"] == 4
    assert torch.equal(result["sem_seg"], wanted["sem_seg"]) and result["sem_seg"].shape[1:] == (64, 64)
    assert torch.equal(result["panoptic_seg"][0], wanted["panoptic_seg"][0])


class FourConvolutions(Backbone):
    """One convolution for each of res2 to res5: the compiler takes minutes for a ResNet, which is not tested here."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        widths = (16, 16, 32, 32)
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_channels = dict(zip(self._out_features, widths))
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32)))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, s, s) for i, o, s in zip((3, *widths), widths, (4, 2, 2, 2)))

    def forward(self, x):
        maps = {}
        for name, conv in zip(self._out_features, self.convs):
            maps[name] = x = conv(x).relu()
        return maps


SHALLOW = (
    *("MODEL.BACKBONE.NAME", "FourConvolutions", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2),
    *("MODEL.ECO.EXITS", [1, 2], "MODEL.ECO.EXITS_PER_STEP", 2, "MODEL.ECO.MAX_EXIT", 2, "MODEL.ECO.EXIT", 2),
    *("MODEL.MASK_FORMER.DEC_LAYERS", 2),
)


QUICK_COMPILER = r"""#!/bin/bash
# g++ without optimisation. The long header that every kernel includes is compiled once for the same flags.
flags=() source=
for word in "$@"; do
    case "$word" in
        *.cpp) source=$word ;;
        -o | *.so | *.o | -shared | -l* | -L* | -Wl*) ;;
        *) flags+=("$word") ;;
    esac
done
if [ -n "$source" ] && grep -q "inductor/cpp_prefix.h" "$source"; then
    header=$0.$(echo "${flags[@]}" | cksum | cut -d" " -f1).h
    if [ ! -e "$header.gch" ]; then
        echo "#include <torch/csrc/inductor/cpp_prefix.h>" > "$header"
        g++ "${flags[@]}" -O0 -x c++-header "$header" -o "$header.gch"
    fi
    exec g++ -include "$header" "$@" -O0
fi
exec g++ "$@" -O0
"""


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """Inductor with a quick compiler, because its kernels run once."""
    import torch._inductor.config as config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiler = tmp_path / "quick"
    compiler.write_text(QUICK_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setattr(config.cpp, "cxx", (None, str(compiler)))
    monkeypatch.setattr(config, "compile_threads", 1)
    # Plain loops: finding out which vector instructions there are takes longer than the kernels.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    monkeypatch.setattr(config, "freezing", False)  # what it turns on ends with this test
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_predictor_gives_what_another_does(tiny, tmp_path, monkeypatch, quick_compiler):
    """At two exits. Backbone and head are one graph each, without breaks.

    One exit becomes C++. The graphs of the other run as they are, so nothing has to be compiled for them.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "FourConvolutions", FourConvolutions)
    weights = tmp_path / "model.pth"
    model = fill(build_model(load_cfg(tiny.config(), SHALLOW)))
    torch.save({"model": model.state_dict()}, weights)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for k in (1, 2):
        opts = [*SHALLOW, "MODEL.WEIGHTS", str(weights), "MODEL.ECO.EXIT", k, "TEST.COMPILE"]
        wanted = load_predictor(tiny.config(), [*opts, False])(image)
        counters.clear()
        with monkeypatch.context() as patch:
            if k == 1:
                patch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
            found = load_predictor(tiny.config(), [*opts, True])(image)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        assert found["exit"] == k
        torch.testing.assert_close(found["sem_seg"], wanted["sem_seg"], atol=1e-4, rtol=1e-4)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'float8'.*float16 or bfloat16"):
        autocast(load("SOLVER.AMP.PRECISION", "float8"), "cpu", True)


def test_a_key_without_effect_is_told_with_its_value_where_a_run_is_set_up(tiny, tmp_path):
    words = ["--config-file", tiny.config(), "TEST.PRECISE_BN.ENABLED", "True", "OUTPUT_DIR", str(tmp_path / "out")]
    setup(argument_parser("").parse_args(words))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "TEST.PRECISE_BN.ENABLED is True, which has no effect" in log and log.count("has no effect") == 1


# --- the optimizer ---------------------------------------------------------------------------------------------------


def clipped(kind: str, limit: float, norm_type: float = 2.0) -> list[torch.Tensor]:
    """Gradients (3, 4) and (12) after clipping."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([12.0])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.register_step_pre_hook(gradient_clipper(kind, limit, norm_type))
    optimizer.step()
    return [-p.detach() for p in parameters]


def test_full_model_clipping_scales_all_alike():
    a, b = clipped("full_model", 1.3)
    torch.testing.assert_close(a, torch.tensor([0.3, -0.4]))
    torch.testing.assert_close(b, torch.tensor([1.2]))


def test_clipping_by_each_parameters_norm():
    a, b = clipped("norm", 1.0)
    torch.testing.assert_close(a, torch.tensor([0.6, -0.8]))
    torch.testing.assert_close(b, torch.tensor([1.0]))
    a, _ = clipped("norm", 2.0, norm_type=math.inf)
    torch.testing.assert_close(a, torch.tensor([1.5, -2.0]))


def test_clipping_by_value():
    a, b = clipped("value", 3.5)
    torch.testing.assert_close(a, torch.tensor([3.0, -3.5]))
    torch.testing.assert_close(b, torch.tensor([3.5]))


def test_small_gradients_are_left_alone():
    for kind in ("full_model", "norm", "value"):
        assert [p.tolist() for p in clipped(kind, 100.0)] == [[3.0, -4.0], [12.0]]


def test_clipping_is_on_as_the_config_says():
    model = nn.Linear(2, 2)
    for enabled, largest in ((True, 0.01), (False, 100.0)):
        cfg = load("SOLVER.CLIP_GRADIENTS.ENABLED", enabled, "SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0)
        optimizer = build_optimizer(cfg, model)
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        assert max(p.grad.abs().max().item() for p in model.parameters()) <= largest


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("SOLVER.OPTIMIZER", "LION", "'LION'.*ADAMW.*SGD"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "median", "'median'.*full_model, norm or value"),
    ],
)
def test_unknown_kinds_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(load(option, value), nn.Linear(1, 1))


def learning_rates(*opts) -> list[float]:
    """The rates of 10 iterations, for one parameter with initial rate 1."""
    cfg = load("SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 10, *opts)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_poly_schedule_is_cityscapes():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 0, "SOLVER.POLY_LR_POWER", 0.9)
    assert learning_rates(*opts) == pytest.approx([(1 - i / 10) ** 0.9 for i in range(10)])
    ending = learning_rates(*opts, "SOLVER.POLY_LR_CONSTANT_ENDING", 0.3)
    assert ending[0] == 1 and ending[-1] == ending[-2] == pytest.approx(0.3)


def test_multistep_schedule_is_cocos():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (4, 8), "SOLVER.WARMUP_FACTOR", 1.0)
    assert learning_rates(*opts, "SOLVER.WARMUP_ITERS", 2) == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)


def test_cosine_schedule_with_warmup():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_FACTOR", 0.1)
    rates = learning_rates(*opts)
    assert rates[0] == pytest.approx(0.1) and rates[0] < rates[1] < rates[2]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(2, 10)])


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def same_points(monkeypatch):
    """The same random points for every mask and image, so that a batch can be compared with its parts."""

    original = torch.rand

    def rand(n, count, two, device=None, dtype=None):
        generator = torch.Generator().manual_seed(count)
        return original((1, count, two), generator=generator, dtype=dtype).expand(n, count, two)

    monkeypatch.setattr(torch, "rand", rand)


def gradients(batches, accumulation_steps: int = 1) -> dict[str, torch.Tensor]:
    model = fill(build(ECO))
    step = make_step(
        model, batches, "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.AMP.ENABLED", False,
        accumulation_steps=accumulation_steps,
    )  # fmt: skip
    step.train(0, 1)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, wanted: dict) -> None:
    """Float32 sums in another order. A few gradients are only the noise of such sums."""
    largest = max(v.norm().item() for v in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 2e-3 * value.norm() + 1e-6 * largest, name


def test_accumulated_batches_of_equally_many_masks_are_one_batch(same_points):
    """The documented behaviour: with unequal numbers each batch is divided by its own."""
    a, b = make_batch(sizes=((64, 96), (64, 96)))
    whole = gradients([[a, b]])
    parts = gradients([[a], [b]], accumulation_steps=2)
    assert whole.keys() == parts.keys()
    assert_close(parts, whole)


def test_accumulated_gradients_are_the_mean_of_the_batches(same_points):
    a, b = make_batch(sizes=((64, 96), (32, 64)))
    b["instances"] = b["instances"][:1]
    parts = gradients([[a], [b]], accumulation_steps=2)
    each = [gradients([[x]]) for x in (a, b)]
    assert_close(parts, {name: (each[0][name] + each[1][name]) / 2 for name in parts})


def test_accumulated_losses_are_reported_as_their_mean():
    class Model(nn.Linear):
        def forward(self, batch):
            return {"loss": super().forward(torch.tensor(batch)).sum() * 0 + batch[0][0]}

    step = make_step(Model(1, 1), [[[1.0]], [[4.0]], [[7.0]]], accumulation_steps=3)
    step.train(0, 1)
    assert step.storage.latest()["total_loss"][0] == pytest.approx(4.0)


def test_a_training_splits_its_batch_and_tells_how(tiny, caplog):
    options = ["SOLVER.IMS_PER_BATCH", 6, "SOLVER.IMS_PER_GPU", 2, "OUTPUT_DIR", str(tiny.base / "split")]
    with caplog.at_level("INFO", "eco_m2f"):
        step = Trainer(load_cfg(tiny.config(), options))._trainer
    assert step.accumulation_steps == 3 and len(next(iter(step.data_loader))) == 2
    assert caplog.messages.count(
        "6 images an optimizer step: processes 1, images per process and pass 2, passes per step 3"
    ) == 1  # fmt: skip
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_GPU is 4, .* 6 images .*: set it to 3 or 6, or to 0"):
        Trainer(load_cfg(tiny.config(), [*options, "SOLVER.IMS_PER_GPU", 4]))


def test_a_reference_number_of_gpus_changes_no_schedule(tiny, caplog):
    """detectron2 would scale batch, rate and iterations by it. Here IMS_PER_GPU is for any number of GPUs."""
    options = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "OUTPUT_DIR", str(tiny.base / "reference")]
    cfg = load_cfg(tiny.config(), options)
    warn_of_keys_without_effect(cfg)
    assert "SOLVER.REFERENCE_WORLD_SIZE is 8, which has no effect" in caplog.text
    assert Trainer(cfg).cfg == cfg and cfg.SOLVER.IMS_PER_BATCH == 2


def test_no_accumulation_steps_are_refused():
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        make_step(nn.Linear(1, 1), [], accumulation_steps=0)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_training_writes_checkpoints_metrics_and_tensorboard_events(tiny):
    cfg = load_cfg(tiny.config(), ["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", str(tiny.base / "run")])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    written = {p.name.split(".")[0] for p in (tiny.base / "run").iterdir()}
    assert {"model_final", "last_checkpoint", "metrics", "events", "inference"} <= written
    assert list((tiny.base / "run").glob("events.out.tfevents.*"))[0].stat().st_size > 100
    metrics = [json.loads(line) for line in (tiny.base / "run" / "metrics.json").read_text().splitlines()]
    assert math.isfinite(metrics[0]["total_loss"]) and any("panoptic_seg/PQ" in m for m in metrics)


@pytest.mark.slow
def test_an_evaluator_that_fails_costs_its_own_result_alone(tiny, tmp_path, monkeypatch, capfd):
    """During a training, which goes on, and in a separate evaluation. The exit status is not 0."""
    monkeypatch.setattr(SemanticEvaluator, "summary", lambda self, rows: {}["no such class"])
    weights = tmp_path / "train" / "model_final.pth"
    for name, flags in {"train": [], "test": ["--eval-only", "MODEL.WEIGHTS", weights]}.items():
        options = ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "OUTPUT_DIR", tmp_path / name]
        assert call("train_net", "--config-file", tiny.config(), *flags, *options) == 1
        err = capfd.readouterr().err
        assert "SemanticEvaluator on" in err and "no such class" in err and err.count("error: ") == 1
        log = (tmp_path / name / "log.txt").read_text()
        assert "Traceback" in log and log.count("Task: panoptic_seg") == (1 if flags else 2)
        results = tmp_path / name / "inference" / tiny.dataset("val") / "results.json"
        assert set(json.loads(results.read_text())) == {"exits", "panoptic_seg", "segm"}
    assert weights.is_file()


class PowerCut(Exception):
    """Not an input error."""


class FailsAt(Trainer):
    """A trainer whose run ends in iteration 3."""

    def before_step(self):
        if self.iter == 3:
            raise PowerCut
        super().before_step()


def stop_workers(trainer: Trainer) -> None:
    """Ends them now: a worker forked before garbage collection would keep their pipes open."""
    trainer._trainer._data_loader_iter_obj = None


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, seed, workers", [("eco_maskformer2", 5, 2), ("eco_maskformer2", -1, 0), ("eco_detr", 5, 0)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny, tmp_path, config, seed, workers):
    """With everything that is random: order of images, augmentation, points, dropout, exits. And with accumulation."""

    def trainer(kind, folder, *more):
        options = ["SEED", seed, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", workers]
        random = ["MODEL.ECO.EXITS_PER_STEP", 2, "MODEL.MASK_FORMER.DROPOUT", 0.1, "MODEL.DETR.DROPOUT", 0.1]
        random += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_GPU", 2]
        data = ["INPUT.MIN_SIZE_TRAIN", (32, 48, 64), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / folder)]
        cfg = load_cfg(tiny.config(config), [*options, *random, *data, *more])
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.manual_seed(0)  # the initial weights
        np.random.seed(len(list((tmp_path / folder).iterdir())))  # for SEED -1: a resumed run would draw another seed
        return kind(cfg)

    whole = trainer(Trainer, "whole")
    whole.resume_or_load(resume=False)
    whole.train()
    stop_workers(whole)
    cut = trainer(FailsAt, "parts")
    cut.resume_or_load(resume=False)
    with pytest.raises(PowerCut):
        cut.train()
    stop_workers(cut)
    resumed = trainer(Trainer, "parts")
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    stop_workers(resumed)
    a, b = (torch.load(tmp_path / f / "model_final.pth", weights_only=False) for f in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    moments = [part["trainer"]["_trainer"]["optimizer"]["state"] for part in (a, b)]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    start = trainer(Trainer, "start").model.state_dict()
    assert any(not torch.equal(a["model"][k], start[k]) for k in start)


def test_nan_losses_stop_the_training_naming_iteration_and_images():
    model = fill(build(ECO))
    batches = [make_batch() for _ in range(3)]
    batches[2][0]["image_id"] = "broken.png"
    step = make_step(model, batches, "SOLVER.BASE_LR", 1e-9)
    weight = model.sem_seg_head.predictor.class_embed.weight
    original = step.run_step

    def spoil():
        if step.iter == 2:
            weight.data[0, 0] = float("nan")
        original()

    step.run_step = spoil
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*loss_ce.*nan.*images \['broken.png', 1\].*BASE_LR"):
        step.train(0, 3)


def test_infinite_losses_count_as_broken():
    with pytest.raises(FloatingPointError, match="b = inf"):
        check_finite({"a": torch.tensor(1.0), "b": torch.tensor(math.inf)}, 0, [{}])
    check_finite({"a": torch.tensor(1.0)}, 0, [{}])


class BreaksLast(Trainer):
    """A trainer whose last step fails."""

    def run_step(self):
        if self.iter + 1 == self.max_iter:
            raise PowerCut("the real error")
        self.storage.put_scalar("loss", 1.0)


@pytest.mark.parametrize("kind, evaluated", [(Trainer, 1), (BreaksLast, 0)])
def test_after_a_failed_last_step_nothing_is_evaluated_nor_saved(tiny, tmp_path, monkeypatch, kind, evaluated):
    calls = []
    monkeypatch.setattr("eco_m2f.engine.train.evaluate", lambda cfg, model: calls.append(1) or {})
    monkeypatch.setattr(Step, "run_step", lambda self: None)
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 5, "OUTPUT_DIR", str(tmp_path)]
    trainer = kind(load_cfg(tiny.config(), options))
    if evaluated:
        trainer.train()
    else:
        closing = [h for h in trainer._hooks if not isinstance(h, hooks.EvalHook)][0]
        monkeypatch.setattr(closing, "after_train", lambda: 1 / 0)  # takes the place of no other error
        with pytest.raises(PowerCut, match="the real error"):
            trainer.train()
    assert len(calls) == evaluated and (tmp_path / "model_final.pth").exists() == bool(evaluated)


def test_batch_norm_with_one_value_per_channel_names_images_and_remedy():
    batch = [{"image": torch.zeros(3, 24, 32), "file_name": "a.png"}]
    with pytest.raises(ValueError, match=r"a.png \(32x24\).*SOLVER.IMS_PER_GPU.*SOLVER.IMS_PER_BATCH.*FrozenBN"):
        with enough_values(batch):
            nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="^another$"), enough_values(batch):
        raise ValueError("another")


# --- configs ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_config_is_told_with_its_source(tmp_path):
    cases = {
        "MODEL: {NOPE: 1}": "MODEL.NOPE",
        "SOLVER: {BASE_LR: [1, 2]}": "BASE_LR",
        "MODEL: [": "flow",
        "MODEL: {WEIGHTS: !!python/object/apply:os.getcwd []}": "python/object",
        "VERSION: 99": "VERSION is 99",
        "SOLVER: {BASE_LR: .nan}": "SOLVER.BASE_LR is nan",
        'SOLVER: {BASE_LR: "1e999"}': "SOLVER.BASE_LR is inf",
        "SOLVER: {MAX_ITER: .inf}": "SOLVER.MAX_ITER",
        "SOLVER: {MAX_ITER: -5}": "SOLVER.MAX_ITER is -5",
        "MODEL: 3": "MODEL",
        "": "holds nothing",
    }
    for i, (text, message) in enumerate(cases.items()):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"(?s)config file {path}.*{message}"):
            load_cfg(str(path))
    with pytest.raises(ValueError, match="options.*MODEL.NOPE"):
        load("MODEL.NOPE", "1")
    with pytest.raises(ValueError, match="options.*SOLVER.BASE_LR is inf"):
        load("SOLVER.BASE_LR", "1e999")
    with pytest.raises(ValueError, match="options.*odd length.*MODEL.DEVICE"):
        load_cfg(str(CONFIGS / ECO), ["MODEL.DEVICE"])
    with pytest.raises(FileNotFoundError, match="'no.yaml'.*configs/"):
        load_cfg("no.yaml")


@pytest.mark.parametrize(
    "key",
    [
        "MODEL.META_ARCHITECTURE",
        "MODEL.BACKBONE.NAME",
        "MODEL.SEM_SEG_HEAD.NAME",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME",
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "MODEL.ECO.POLICY",
    ],
)
def test_a_part_that_does_not_exist_is_named(key):
    with pytest.raises(ValueError, match="'Nonesuch' found in '.*' registry"):
        build_model(load(key, "Nonesuch"))


def test_without_a_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_cfg(str(CONFIGS / ECO), ["MODEL.DEVICE", "cuda:0", "MODEL.RESNETS.NORM", "SyncBN"])
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM) == ("cpu", "BN")
