"""Checkpoints: official names in every style, strictness, and which weights a model takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import CLASSES, SHAPES, STYLES, C, assert_loaded, legacy, write_pkl, write_pth
from safetensors.torch import load_file

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.fits import check_fits
from eco_m2f.checkpoint.names import upgrade_keys
from eco_m2f.checkpoint.safe_load import CheckpointError, write_weights


@pytest.mark.parametrize("style", STYLES)
def test_upgrade_makes_the_current_names(weights, style):
    old = STYLES[style](weights)
    before = dict(old)
    new = upgrade_keys(old)
    assert set(new) == set(SHAPES)
    assert all(new[k] is weights[k] for k in new)  # each value has its own name
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
    assert "It has none of Mask2Former's names" in str(error.value)


def test_another_architecture_is_recognised(weights):
    deeper = weights | {
        f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}.linear1.weight": torch.zeros(C, C) for i in (2, 3)
    }
    with pytest.raises(CheckpointError, match="4 vs 2 encoder layers"):
        check_fits(deeper, weights, "m.pth")
    swin = {k: v for k, v in weights.items() if not k.startswith("backbone")}
    swin["backbone.patch_embed.proj.weight"] = torch.zeros(2, 3, 4, 4)
    with pytest.raises(CheckpointError, match="Swin vs ResNet backbone"):
        check_fits(swin, weights, "m.pth")


def test_another_class_count_is_named_with_the_remedy(weights):
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


def test_official_architectures_are_distinguished(shared):
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
    """A file like ImageNet weights: no prefix, matching heuristics, and a last norm as wide as the heads."""
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
