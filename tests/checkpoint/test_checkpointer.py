"""Checkpoints: official names in every style, strictness, hostile and broken files, interrupted saves, resuming."""

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from safetensors.torch import load_file
from torch import nn

from eco_m2f import files
from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.fits import check_fits
from eco_m2f.checkpoint.names import upgrade_keys
from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint, write_weights
from eco_m2f.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]
C, CLASSES, QUERIES = 4, 3, 5
# Official names with tiny shapes.
SHAPES = {
    "backbone.stem.conv1.weight": (2, 3, 7, 7),
    "backbone.stem.conv1.norm.weight": (2,),
    "backbone.res2.0.conv1.weight": (2, 2, 1, 1),
    "sem_seg_head.pixel_decoder.input_proj.0.0.weight": (C, 2, 1, 1),
    "sem_seg_head.pixel_decoder.transformer.level_embed": (3, C),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight": (C, C),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.linear1.weight": (C, C),
    "sem_seg_head.pixel_decoder.adapter_1.norm.weight": (C,),
    "sem_seg_head.predictor.query_feat.weight": (QUERIES, C),
    "sem_seg_head.predictor.class_embed.weight": (CLASSES + 1, C),
    "sem_seg_head.predictor.class_embed.bias": (CLASSES + 1,),
    "criterion.empty_weight": (CLASSES + 1,),
}


class Tree(nn.Module):
    """Modules nested as the dots in the names say, with the given shapes as parameters."""

    def __init__(self, shapes: dict[str, tuple]):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.randn(shape)))


@pytest.fixture
def model() -> Tree:
    return Tree(SHAPES)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def legacy(weights: dict) -> dict:
    """The names of the oldest published files."""
    new = {k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): v for k, v in weights.items()}
    return {k.replace("query_feat", "static_query"): v for k, v in new.items()}


def distributed(weights: dict) -> dict:
    return {"module." + k: v for k, v in weights.items()}


STYLES = {"current": dict, "legacy": legacy, "distributed": distributed, "both": lambda w: distributed(legacy(w))}


def write_pkl(path: Path, data, protocol: int = 2) -> str:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return str(path)


def write_pth(path: Path, data) -> str:
    torch.save(data, path)
    return str(path)


def assert_loaded(model: nn.Module, weights: dict) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


# --- names


@pytest.mark.parametrize("style", STYLES)
def test_upgrade_makes_the_current_names(weights, style):
    old = STYLES[style](weights)
    before = dict(old)
    new = upgrade_keys(old)
    assert set(new) == set(SHAPES)
    assert all(new[k] is weights[k] for k in new)  # each value under its own name
    assert old == before, "the argument was changed"
    assert upgrade_keys(new) == new, "not idempotent"


def test_upgrade_leaves_every_official_name_as_it_is(shared):
    for names in json.loads((shared / "oracle" / "state_dicts.json").read_text()).values():
        assert list(upgrade_keys(names)) == list(names)
        assert set(upgrade_keys(legacy(names))) == set(names)


def test_upgrade_refuses_two_names_for_one_tensor():
    with pytest.raises(CheckpointError, match=r"adapter_1\.weight' twice"):
        upgrade_keys({"sem_seg_head.adapter_1.weight": 1, "sem_seg_head.pixel_decoder.adapter_1.weight": 2})


def test_upgrade_keeps_a_module_of_that_name():
    assert set(upgrade_keys({"module.a": 1, "b": 2})) == {"module.a", "b"}


# --- loading


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_pth_loads_strictly(tmp_path, model, weights, style, wrapped):
    data = STYLES[style](weights)
    path = write_pth(tmp_path / "m.pth", {"model": data} if wrapped else data)
    Checkpointer(model).load_for_evaluation(path)
    assert_loaded(model, weights)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("as_numpy", [True, False])
def test_pkl_loads_strictly(tmp_path, model, weights, style, protocol, as_numpy):
    data = {k: v.numpy() if as_numpy else v for k, v in STYLES[style](weights).items()}
    path = write_pkl(tmp_path / "m.pkl", {"model": data, "__author__": "zoo"}, protocol)
    Checkpointer(model).load_for_evaluation(path)
    assert_loaded(model, weights)


@pytest.mark.parametrize("case", ["m2f_mini_r50", "m2f_mini_swin"])
@pytest.mark.parametrize("style", STYLES)
def test_reference_weights_load_into_the_real_model(tmp_path, shared, build_mini, case, style):
    folder = shared / "oracle" / case
    reference = load_file(folder / "weights.safetensors")
    config = json.loads((folder / "case.json").read_text())
    model = build_mini(config["base_config"], *config["opts"], mini=False)
    data = {k: v.numpy() for k, v in STYLES[style](reference).items()}
    path = write_pkl(tmp_path / "m.pkl", {"model": data, "__author__": "zoo"})
    Checkpointer(model).load_for_evaluation(path)
    assert_loaded(model, reference)


def test_a_real_model_comes_back_from_its_own_checkpoint(tmp_path, build_mini, fill_weights):
    model = fill_weights(build_mini())
    Checkpointer(model, str(tmp_path)).save("model_final")
    other = build_mini()
    Checkpointer(other).load_for_evaluation(str(tmp_path / "model_final.pth"))
    assert_loaded(other, model.state_dict())


def test_strict_names_what_is_missing_and_unexpected_and_leaves_the_model(tmp_path, model, weights):
    del weights["backbone.res2.0.conv1.weight"]
    weights["backbone.fc.weight"] = torch.zeros(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        Checkpointer(model).load_for_evaluation(write_pth(tmp_path / "m.pth", weights))
    assert "m.pth" in str(error.value)
    assert "1 missing in the checkpoint:\n    backbone.res2.0.conv1.weight" in str(error.value)
    assert "1 not in the model:\n    backbone.fc.weight" in str(error.value)
    assert_loaded(model, before)


def test_strict_lets_exit_policy_and_step_counters_go(weights):
    gate = {"exit_policy.gate.weight": torch.zeros(2)}
    counter = {"backbone.stem.conv1.norm.num_batches_tracked": torch.tensor(3)}
    check_fits(weights, weights | gate | counter, "m.pth")
    check_fits(weights | gate | counter, weights, "m.pth")
    check_fits(weights | gate, weights | {"exit_policy.gate.weight": torch.zeros(3)}, "m.pth")
    with pytest.raises(CheckpointError, match="not in the model"):
        check_fits(weights | {"exit_policies": torch.zeros(1)}, weights, "m.pth")


def test_long_lists_are_cut(weights):
    with pytest.raises(CheckpointError, match=r"(?s)12 missing.*\.\.\. and 7 more") as error:
        check_fits({"x": torch.zeros(1)}, weights, "m.pth")
    assert "None of its names is Mask2Former's" in str(error.value)


def test_another_architecture_is_told_as_such(weights):
    deeper = weights | {
        f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}.linear1.weight": torch.zeros(C, C) for i in (2, 3)
    }
    with pytest.raises(CheckpointError, match="4 vs 2 encoder layers"):
        check_fits(deeper, weights, "m.pth")
    swin = {k: v for k, v in weights.items() if not k.startswith("backbone")}
    swin["backbone.patch_embed.proj.weight"] = torch.zeros(2, 3, 4, 4)
    with pytest.raises(CheckpointError, match="Swin vs ResNet backbone"):
        check_fits(swin, weights, "m.pth")


def test_another_class_count_is_told_with_the_remedy(weights):
    of_classes = [k for k in weights if "class_embed" in k or "empty_weight" in k]
    other = weights | {k: torch.zeros(8, *weights[k].shape[1:]) for k in of_classes}
    with pytest.raises(CheckpointError) as error:
        check_fits(other, weights, "m.pth")
    assert "7 classes and the model 3" in str(error.value)
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES 7" in str(error.value)
    assert "(8, 4) in the checkpoint, (4, 4) in the model" in str(error.value)
    assert "another architecture" not in str(error.value)


def test_tensors_of_odd_shape_do_not_hide_the_reason(weights):
    odd = weights | {k: torch.tensor(1.0) for k in weights if "class_embed" in k or "query_feat" in k}
    with pytest.raises(CheckpointError, match=r"class_embed.weight: \(\) in the checkpoint, \(4, 4\) in the model"):
        check_fits(odd, weights, "m.pth")


def test_official_architectures_are_told_apart(shared):
    official = json.loads((shared / "oracle" / "state_dicts.json").read_text())
    states = {n: {k: torch.empty(s, device="meta") for k, s in d.items()} for n, d in official.items()}
    for name, state in states.items():
        check_fits(state, state, name)
    with pytest.raises(CheckpointError, match="12 vs 24 backbone blocks"):
        check_fits(states["coco_swin_t"], states["coco_swin_s"], "swin_t.pkl")
    with pytest.raises(CheckpointError, match="133 classes and the model 19"):
        check_fits(states["coco_r50"], states["city_r50"], "r50.pkl")


def test_training_takes_what_fits(tmp_path, model, weights, caplog):
    weights["sem_seg_head.predictor.class_embed.bias"] = torch.zeros(9)
    before = model.state_dict()["sem_seg_head.predictor.class_embed.bias"].clone()
    with caplog.at_level("INFO", "eco_m2f.checkpoint.checkpointer"):
        Checkpointer(model).load(write_pth(tmp_path / "m.pth", weights))
    after = model.state_dict()
    assert torch.equal(after["sem_seg_head.predictor.class_embed.bias"], before)
    assert torch.equal(after["backbone.stem.conv1.weight"], weights["backbone.stem.conv1.weight"])
    assert "3 of 3 backbone tensors and 8 of 9 others loaded" in caplog.text
    assert "class_embed.bias: (9,) in the checkpoint, (4,) in the model" in caplog.text


def backbone_pickle(path: Path, weights: dict) -> str:
    """As ImageNet weights come: no prefix, matching heuristics, and a last norm as wide as the heads."""
    data = {k.removeprefix("backbone."): v.numpy() for k, v in weights.items() if k.startswith("backbone.")}
    data["norm.weight"] = np.full(C, 7.0, np.float32)
    return write_pkl(path, {"model": data, "__author__": "third_party", "matching_heuristics": True})


def test_backbone_weights_are_matched_with_the_backbone_alone(tmp_path, model, weights, caplog):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level("INFO", "eco_m2f.checkpoint.checkpointer"):
        Checkpointer(model).load(backbone_pickle(tmp_path / "b.pkl", weights))
    for name, value in model.state_dict().items():
        assert torch.equal(value, (weights if name.startswith("backbone.") else before)[name]), name
    assert "3 of 3 backbone tensors and 0 of 9 others" in caplog.text


def test_backbone_weights_are_no_model_to_evaluate(tmp_path, model, weights):
    with pytest.raises(CheckpointError, match="missing in the checkpoint"):
        Checkpointer(model).load_for_evaluation(backbone_pickle(tmp_path / "b.pkl", weights))


def test_weights_of_another_backbone_are_an_error(tmp_path, model):
    data = {"patch_embed.proj.weight": np.zeros((2, 3, 4, 4), np.float32)}
    path = write_pkl(tmp_path / "b.pkl", {"model": data, "__author__": "third_party", "matching_heuristics": True})
    with pytest.raises(CheckpointError, match="patch_embed.*fits any of the backbone's 3.*another backbone"):
        Checkpointer(model).load(path)


def test_query_asks_for_matching_heuristics(tmp_path, model, weights):
    data = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    path = write_pth(tmp_path / "b.pth", data)
    with pytest.raises(CheckpointError, match="none of the 3 tensors"):
        Checkpointer(model).load(path)
    Checkpointer(model).load(path + "?matching_heuristics=True")
    assert torch.equal(model.backbone.stem.conv1.weight, weights["backbone.stem.conv1.weight"])


def test_empty_path_trains_from_scratch_but_does_not_evaluate(model):
    assert Checkpointer(model).load("") == {}
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        Checkpointer(model).load_for_evaluation("")


def test_a_torch_file_under_a_pickles_name_is_read_as_what_it_is(tmp_path, model, weights):
    Checkpointer(model).load_for_evaluation(write_pth(tmp_path / "m.pkl", {"model": weights}))
    assert_loaded(model, weights)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value, fault",
    [
        (torch.ones(CLASSES + 1, dtype=torch.int64), "torch.int64 in the checkpoint, torch.float32 in the model"),
        (torch.ones(CLASSES + 1, dtype=torch.bool), "torch.bool in the checkpoint"),
        (torch.ones(CLASSES + 1, dtype=torch.complex64), "torch.complex64 in the checkpoint"),
        (torch.tensor([1, float("nan"), float("inf"), 0]), "2 of 4 values are NaN or infinite"),
        (torch.full((CLASSES + 1,), 1e300, dtype=torch.float64), "4 of 4 values are NaN or infinite"),  # as float32
        (torch.ones(CLASSES + 1).to_sparse(), "it is a sparse tensor"),
        (torch.ones(CLASSES + 1, device="meta"), "it is a meta tensor"),
        (torch.ones(CLASSES + 1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "torch.float4_e2m1fn_x2 in the"),
        (torch.quantize_per_tensor(torch.ones(CLASSES + 1), 0.1, 0, torch.qint8), "it is a quantized tensor"),
    ],
)
def test_values_that_no_model_has_are_refused_before_it_is_touched(model, weights, monkeypatch, value, fault, strict):
    weights["criterion.empty_weight"] = value
    monkeypatch.setattr("eco_m2f.checkpoint.checkpointer.read_checkpoint", lambda path: {"model": weights})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        Checkpointer(model).load("m.pth", strict=strict)
    assert "m.pth" in str(error.value) and f"criterion.empty_weight: {fault}" in str(error.value)
    assert_loaded(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_width_are_taken(tmp_path, model, weights, dtype):
    weights = {k: v.to(dtype) for k, v in weights.items()}
    Checkpointer(model).load_for_evaluation(write_pth(tmp_path / "m.pth", weights))
    assert_loaded(model, {k: v.float() for k, v in weights.items()})


def test_safetensors_are_weights_as_any_other(tmp_path, model, weights):
    write_weights(tmp_path / "m.safetensors", legacy(weights))
    Checkpointer(model).load_for_evaluation(str(tmp_path / "m.safetensors"))
    assert_loaded(model, weights)


# --- broken and hostile files


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_missing_file(tmp_path, model, suffix):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*gone{suffix}: check MODEL.WEIGHTS"):
        Checkpointer(model).load(str(tmp_path / f"gone{suffix}"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, weights, suffix, kept):
    path = tmp_path / f"m{suffix}"
    (write_pth if suffix == ".pth" else write_pkl)(path, {"model": weights, "__author__": "x"})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=rf"m{suffix} \({int(kept * len(data))} bytes\).*truncated"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_web_page_saved_as_a_checkpoint(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(CheckpointError, match=r"44 bytes\) cannot be read"):
        read_checkpoint(path)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "system": (os.system, "touch {}"),
    "eval": (eval, "open({!r}, 'w')"),
    "open": (open, "{}", "w"),
    "namedtuple": (collections.namedtuple, "a", "b"),  # harmless in itself, and refused all the same
    "popen": (subprocess.Popen, "touch {}"),
    "load": (torch.load, "{}"),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickle_that_runs_code_is_refused_by_name(tmp_path, model, attack, suffix):
    function, *arguments = ATTACKS[attack]
    trace = tmp_path / "ran"
    call = Attack(function, *(a.format(str(trace)) for a in arguments))
    write = write_pth if suffix == ".pth" else write_pkl
    path = write(tmp_path / f"evil{suffix}", {"model": {"a": call}, "__author__": "x"})
    with pytest.raises(CheckpointError, match=f"was refused.*{function.__name__}"):
        Checkpointer(model).load(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_storage_bytes_inside_a_pickle_are_no_way_in(tmp_path):
    """torch pickles a tensor's bytes as a pickle of their own, which must be opened as carefully."""
    trace = tmp_path / "ran"
    inner = pickle.dumps(Attack(os.system, f"touch {trace}"))
    path = write_pkl(tmp_path / "evil.pkl", {"model": {"a": Attack(torch.storage._load_from_bytes, inner)}})
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


def test_object_arrays_are_no_way_in(tmp_path):
    trace = tmp_path / "ran"
    array = np.array([Attack(os.system, f"touch {trace}")], dtype=object)
    with pytest.raises(CheckpointError, match=r"refused.*numpy\.dtype\(O8\)"):
        read_checkpoint(write_pkl(tmp_path / "evil.pkl", {"model": {"a": array}}))
    assert not trace.exists()


@pytest.mark.parametrize("data", [[1, 2], {}, {"model": {}}, {"model": 3}, {"model": {"a": "text"}}, {"a": 1.0}])
def test_files_without_weights(tmp_path, data):
    with pytest.raises(CheckpointError, match="holds a list|holds a dict|holds no weights|not an array"):
        read_checkpoint(write_pth(tmp_path / "m.pth", data))


def test_caffe2_weights_are_recognised(tmp_path):
    blobs = {"conv1_w": np.zeros((2, 3, 7, 7), np.float32), "conv1_w_momentum": np.zeros(1, np.float32)}
    checkpoint = read_checkpoint(write_pkl(tmp_path / "m.pkl", {"blobs": blobs}))
    assert set(checkpoint["model"]) == {"conv1_w"}
    assert checkpoint["matching_heuristics"] and checkpoint["__author__"] == "Caffe2"


def test_unreachable_url(model, monkeypatch):
    def refuse(path):
        raise OSError("no route to host")

    monkeypatch.setattr("eco_m2f.checkpoint.checkpointer.PathManager.get_local_path", refuse)
    with pytest.raises(CheckpointError, match="https://x.invalid/m.pth cannot be fetched.*no route.*download it"):
        Checkpointer(model).load("https://x.invalid/m.pth")


# --- saving and resuming


class Run:
    """Stands for the trainer: what is saved beside the model."""

    def __init__(self, iteration: int = 0):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def test_resume_goes_on_where_the_run_stopped(tmp_path, model):
    Checkpointer(model, str(tmp_path), trainer=Run(41)).save("model_0000041", iteration=41, lr=np.float64(0.1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000041.pth"]
    other, run = Tree(SHAPES), Run()
    extra = Checkpointer(other, str(tmp_path), trainer=run).resume_or_load("unused.pth", resume=True)
    assert_loaded(other, model.state_dict())
    assert run.iteration == 41
    assert extra["iteration"] == 41 and extra["lr"] == 0.1


def test_resume_restores_the_optimizer_exactly(tmp_path, model):
    def step(model, optimizer, scheduler):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()

    def parts(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)

    optimizer, scheduler = parts(model)
    for _ in range(3):
        step(model, optimizer, scheduler)
    Checkpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler).save("a")
    other = Tree(SHAPES)
    other_parts = parts(other)
    names = dict(zip(("optimizer", "scheduler"), other_parts, strict=True))
    Checkpointer(other, str(tmp_path), **names).resume_or_load("", resume=True)
    step(model, optimizer, scheduler)
    step(other, *other_parts)
    assert_loaded(other, model.state_dict())


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": (self.weight * batch).pow(2).sum()}


def train(folder: Path, start: int, stop: int, resume: bool) -> OneWeight:
    """A few iterations with detectron2's loop, hooks and schedule; saves every second one."""
    model = OneWeight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    multiplier = WarmupParamScheduler(MultiStepParamScheduler([1.0, 0.1], milestones=[5], num_updates=8), 0.1, 0.25)
    scheduler = LRMultiplier(optimizer, multiplier, max_iter=8)
    trainer = SimpleTrainer(model, [torch.tensor([1.0, 2.0, 3.0])] * 8, optimizer)
    checkpointer = Checkpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), hooks.PeriodicCheckpointer(checkpointer, 2)])
    checkpointer.resume_or_load("", resume=resume)
    assert not resume or trainer.iter + 1 == start
    trainer.train(start, stop)
    return model


def test_a_detectron2_run_in_two_parts_equals_one_in_one_part(tmp_path):
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()
    train(tmp_path / "parts", 0, 4, resume=False)
    resumed = train(tmp_path / "parts", 4, 8, resume=True)
    whole = train(tmp_path / "whole", 0, 8, resume=False)
    assert torch.equal(resumed.weight, whole.weight)
    assert not torch.equal(resumed.weight, OneWeight().weight)


def test_without_resume_only_weights_are_loaded(tmp_path, model):
    Checkpointer(model, str(tmp_path), trainer=Run(41)).save("a")
    run = Run()
    Checkpointer(Tree(SHAPES), str(tmp_path), trainer=run).resume_or_load(str(tmp_path / "a.pth"), resume=False)
    assert run.iteration == 0


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_run_killed_while_saving_leaves_the_last_checkpoint(tmp_path, model, monkeypatch, where):
    checkpointer = Checkpointer(model, str(tmp_path), trainer=Run(1))
    checkpointer.save("model_1")
    good = (tmp_path / "model_1.pth").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    target = {"write": (torch, "save"), "fsync": (files.os, "fsync"), "replace": (files.os, "replace")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, die)
        for name in ("model_2", "model_1"):  # a new file, and one over the good one
            with pytest.raises(KeyboardInterrupt):
                checkpointer.save(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert (tmp_path / "model_1.pth").read_bytes() == good
    run = Run()
    Checkpointer(Tree(SHAPES), str(tmp_path), trainer=run).resume_or_load("", resume=True)
    assert run.iteration == 1


KILLED = """
import os, sys
from eco_m2f.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_run_left_goes_and_what_is_being_written_stays(tmp_path, model):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model_1.pth"], cwd=ROOT)
    assert done.returncode == -9 and len(list(tmp_path.glob(".model_1.pth.*.tmp"))) == 1
    own = tmp_path / f".model_0.pth.{os.getpid()}.tmp"
    own.write_bytes(b"of a process that had this number before")
    (tmp_path / ".notes.tmp").write_text("not ours")
    with files.atomic_write(tmp_path / "model_2.pth") as handle:
        handle.write(b"being ")
        Checkpointer(model, str(tmp_path), save_to_disk=False).resume_or_load("", resume=True)
        assert own.exists()  # a process that writes nothing removes nothing
        Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)
        handle.write(b"written")
    assert {p.name for p in tmp_path.iterdir()} == {".notes.tmp", "model_2.pth"}
    assert (tmp_path / "model_2.pth").read_bytes() == b"being written"


def test_the_folder_is_synced_after_the_file_has_its_name(tmp_path, monkeypatch):
    synced, original = [], os.fsync

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "a").exists()))
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with files.atomic_write(tmp_path / "a") as handle:
        handle.write(b"x")
    assert synced[0][1] is False and synced[1] == (str(tmp_path), True)


def test_a_leftover_of_a_killed_process_is_no_checkpoint(tmp_path, model):
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("a")
    (tmp_path / ".b.pth.123.tmp").write_bytes(b"half")
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "a.pth")]


@pytest.mark.parametrize("harm", ["gone", "truncated"])
def test_a_harmed_last_checkpoint_names_the_newest_whole_one(tmp_path, model, harm):
    checkpointer = Checkpointer(model, str(tmp_path), trainer=Run())
    for i, name in enumerate(("model_1", "model_2", "model_3")):
        checkpointer.save(name)
        os.utime(tmp_path / f"{name}.pth", (i, i))
    last = tmp_path / "model_3.pth"
    last.unlink() if harm == "gone" else last.write_bytes(last.read_bytes()[:-100])
    expected = "model_3.pth, which (does not exist|is truncated).*go on from model_2.pth"
    with pytest.raises(CheckpointError, match=expected):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("record", ["the weights", "the training state"])
def test_a_resumed_run_never_starts_from_a_damaged_checkpoint(tmp_path, model, record):
    class Optimizer(Run):
        def state_dict(self):
            return {"exp_avg": torch.full((7,), 0.123)}

    for name in ("model_1", "model_2"):
        Checkpointer(model, str(tmp_path), trainer=Optimizer()).save(name)
    os.utime(tmp_path / "model_1.pth", (1, 1))
    path, weight = tmp_path / "model_2.pth", model.state_dict()["criterion.empty_weight"]
    wanted = weight if record == "the weights" else torch.full((7,), 0.123)
    content = bytearray(path.read_bytes())
    content[content.index(wanted.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    expected = r"names model_2\.pth, which is damaged: Bad CRC-32 .*to go on from model_1\.pth"
    with pytest.raises(CheckpointError, match=expected):
        Checkpointer(Tree(SHAPES), str(tmp_path), trainer=Optimizer()).resume_or_load("", resume=True)


def test_damage_to_the_very_end_of_an_archive_is_told_too(tmp_path, model):
    for name in ("model_1", "model_2"):
        Checkpointer(model, str(tmp_path), trainer=Run()).save(name)
    path = tmp_path / "model_2.pth"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x06\x07") + 16] = 2  # on so many disks
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"names model_2\.pth, which is damaged: .*disks.*to go on from model_1"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_a_last_checkpoint_that_is_no_text_is_told(tmp_path, model):
    Checkpointer(model, str(tmp_path)).save("a")
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="last_checkpoint holds no file name"):
        Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_the_state_of_another_run_is_told_with_its_file(tmp_path, model):
    class Other(Run):
        def state_dict(self):
            return {"step": 1}

    Checkpointer(model, str(tmp_path), trainer=Other()).save("a")
    with pytest.raises(CheckpointError, match=r"state of trainer in .*a\.pth does not go with this run \(KeyError"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_resuming_needs_the_training_state(tmp_path, model):
    Checkpointer(model, str(tmp_path)).save("weights_only")
    with pytest.raises(CheckpointError, match="weights_only.pth holds no state of trainer"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_nothing_is_written_where_saving_is_off(tmp_path, model):
    Checkpointer(model, str(tmp_path), save_to_disk=False).save("a")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_folder_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="best/model"):
        Checkpointer(model, str(tmp_path)).save("best/model")


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
