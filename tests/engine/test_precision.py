"""Mixed precision, and a compiled predictor."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from engine_steps import load, make_step
from minis import ECO, build, fill, make_batch
from PIL import Image
from torch import nn

from eco_m2f.engine.command_line import argument_parser
from eco_m2f.engine.datasets import build_test_loader
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.optimizer import autocast
from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.setup import build_model, load_cfg, setup
from eco_m2f.engine.step import Step


def set_scale(step: Step, scale: float) -> None:
    """The state after the first steps, which find a scale that does not overflow."""
    if step.scaler.is_enabled():
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


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
            if k == 2:
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
