"""The parent against the reference implementation: numbers recorded with it, in the reference data."""

import json

import pytest
import torch
from safetensors.torch import load_file

PARENTS = {
    "coco_r50": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "coco_swin_t": "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml",
    "coco_swin_s": "coco/panoptic-segmentation/swin/maskformer2_swin_small_bs16_50ep.yaml",
    "coco_swin_b": "coco/panoptic-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_50ep.yaml",
    "city_r50": "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml",
    "city_swin_t": "cityscapes/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_90k.yaml",
}
MILLION_PARAMETERS = {"coco_r50": 43.984, "coco_swin_t": 47.435, "coco_swin_s": 68.753, "coco_swin_b": 106.918}


@pytest.fixture(scope="module", params=["m2f_mini_r50", "m2f_mini_swin"])
def case(request, shared, build_mini):
    folder = shared / "oracle" / request.param
    case = json.loads((folder / "case.json").read_text())
    model = build_mini(case["base_config"], *case["opts"], mini=False)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    return model, load_file(folder / "expected.safetensors")


@torch.no_grad()
def test_every_exit_matches_the_reference(case):
    model, expected = case
    images = model.preprocess([{"image": expected["image0"]}, {"image": expected["image1"]}])
    features = model.backbone(images.tensor)
    close = lambda actual, name: torch.testing.assert_close(actual, expected[name], atol=1e-4, rtol=1e-5)  # noqa: E731
    for name, feature in features.items():
        close(feature, f"backbone.{name}")
    exits = [2, 3, 4, 5, 6]
    states = model.sem_seg_head.pixel_decoder.forward_exits(features, exits)
    preds = model.sem_seg_head.forward_exits(features, exits)
    for k in exits:
        close(states[k][0], f"exit{k}.mask_features")
        for i, level in enumerate(states[k][1]):
            close(level, f"exit{k}.multi_scale{i}")
        outputs = {"": preds[k], **{f"aux{i}.": aux for i, aux in enumerate(preds[k]["aux_outputs"])}}
        for prefix, output in outputs.items():
            if not prefix or f"exit{k}.aux0.pred_masks" in expected:
                close(output["pred_logits"], f"exit{k}.{prefix}pred_logits")
                close(output["pred_masks"], f"exit{k}.{prefix}pred_masks")


@pytest.mark.parametrize("name", PARENTS)
def test_state_dict_has_the_published_names_and_shapes(name, oracle_json, build_mini):
    model = build_mini(PARENTS[name], mini=False)
    actual = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert actual == oracle_json("state_dicts.json")[name]
    if name in MILLION_PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLION_PARAMETERS[name], abs=5e-4)


@pytest.mark.parametrize("name", ["coco_r50", "coco_swin_t"])
def test_optimizer_groups_match_the_reference(name, oracle_json):
    from detectron2.modeling import build_model
    from minis import CONFIGS

    from eco_m2f.engine import load_cfg, parameter_groups

    cfg = load_cfg(str(CONFIGS / PARENTS[name]), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    names = {id(p): n for n, p in model.named_parameters()}
    actual = {
        names[id(p)]: [group["lr"], group["weight_decay"]]
        for group in parameter_groups(cfg, model)
        for p in group["params"]
    }
    expected = oracle_json("param_groups.json")[name]
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value), key
