"""The parent against numbers recorded with the reference implementation, and against the plain head.

The recorded numbers are reference data, which a checkout lacks. Two tests need none of it: the plain head, which is
itself compared with the recorded numbers if they exist, and the predictor's first layer, in assets/predictor.npz.
"""

import json

import numpy as np
import pytest
import torch
from minis import CONFIGS, make_batch, pixel_decoder_exits
from on_meta import build_on_meta
from plain_head import PlainHead
from safetensors.torch import load_file

from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.mask2former.transformer_decoder import MultiScaleMaskedTransformerDecoder

pytestmark = pytest.mark.slow

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
    states = pixel_decoder_exits(model.sem_seg_head.pixel_decoder, features, exits)
    inferred, preds = model.sem_seg_head.forward_exits(features, exits), with_aux(model.sem_seg_head, features, exits)
    for k in exits:
        close(states[k][0], f"exit{k}.mask_features")
        for i, level in enumerate(states[k][1]):
            close(level, f"exit{k}.multi_scale{i}")
        outputs = [("", inferred[k]), ("", preds[k])]
        outputs += [(f"aux{i}.", aux) for i, aux in enumerate(preds[k]["aux_outputs"])]
        for prefix, output in outputs:
            if not prefix or f"exit{k}.aux0.pred_masks" in expected:
                close(output["pred_logits"], f"exit{k}.{prefix}pred_logits")
                close(output["pred_masks"], f"exit{k}.{prefix}pred_masks")


def with_aux(head, features, exits) -> dict[int, dict]:
    """The predictions with aux_outputs."""
    shared, states = head.encode(features, exits)
    return {k: head.decode(shared, states[k]) for k in exits}


@torch.no_grad()
def test_inference_makes_masks_of_full_size_once_for_each_exit(build_mini, mini_batch, monkeypatch):
    model = build_mini()
    images = model.preprocess(mini_batch)
    features, full = model.backbone(images.tensor), tuple(n // 4 for n in images.tensor.shape[-2:])
    sizes, predictor = [], model.sem_seg_head.predictor
    original = predictor._masks
    monkeypatch.setattr(predictor, "_masks", lambda x, maps: sizes.append(tuple(maps.shape[-2:])) or original(x, maps))
    model.sem_seg_head.forward_exits(features, [2, 6])
    assert sizes.count(full) == 2 and len(sizes) == 2 * (predictor.num_layers + 1)


def test_the_plain_head_matches_the_reference(case):
    model, expected = case
    plain = PlainHead(model.state_dict())
    for image in (0, 1):
        features = {name: expected[f"backbone.{name}"][image] for name in ("res2", "res3", "res4", "res5")}
        for k in (2, 3, 4, 5, 6):
            found = plain(features, k)
            outputs = {"mask_features": found["mask_features"]}
            outputs |= {f"multi_scale{i}": level for i, level in enumerate(found["maps"])}
            for prefix, (logits, masks) in zip(("aux0.", "aux1.", "aux2.", ""), found["predictions"], strict=True):
                outputs |= {f"{prefix}pred_logits": logits, f"{prefix}pred_masks": masks}
            recorded = {name: expected[f"exit{k}.{name}"] for name in outputs if f"exit{k}.{name}" in expected}
            assert len(recorded) == (12 if k in (2, 6) else 6)
            for name, value in recorded.items():
                np.testing.assert_allclose(outputs[name], value[image], atol=1e-5, err_msg=f"exit {k}, {name}")


@pytest.mark.parametrize("sizes", [((64, 96), (60, 80)), ((33, 129), (96, 40))])
@torch.no_grad()
def test_every_exit_matches_the_plain_head(build_mini, fill_weights, sizes):
    """At these sizes no mask logit is within 1e-4 of the predictor's threshold, so rounding decides nothing."""
    model = fill_weights(build_mini())
    plain = PlainHead(model.state_dict())
    features = model.backbone(model.preprocess(make_batch(sizes)).tensor)
    exits = [1, 2, 3, 4, 5, 6]
    states = pixel_decoder_exits(model.sem_seg_head.pixel_decoder, features, exits)
    inferred, preds = model.sem_seg_head.forward_exits(features, exits), with_aux(model.sem_seg_head, features, exits)
    close = lambda actual, wanted: np.testing.assert_allclose(actual, wanted, atol=1e-4, rtol=1e-5)  # noqa: E731
    for k in exits:
        for image in (0, 1):
            wanted = plain({name: f[image] for name, f in features.items()}, k)
            mask_features, maps = states[k]
            close(mask_features[image], wanted["mask_features"])
            for level, wanted_level in zip(maps, wanted["maps"], strict=True):
                close(level[image], wanted_level)
            outputs = [*preds[k]["aux_outputs"], preds[k], inferred[k]]
            for output, (logits, masks) in zip(
                outputs, [*wanted["predictions"], wanted["predictions"][-1]], strict=True
            ):
                close(output["pred_logits"][image], logits)
                close(output["pred_masks"][image], masks)


@torch.no_grad()
def test_the_predictors_first_layer_matches_recorded_numbers(assets):
    """Masks at the 2 x 3 pixels of the layer's attention. Resizing commutes with making masks."""
    data = {k: torch.from_numpy(v) for k, v in np.load(assets / "predictor.npz").items()}
    weights = {k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")}
    predictor = MultiScaleMaskedTransformerDecoder(
        64,
        num_classes=7,
        hidden_dim=64,
        num_queries=20,
        num_heads=8,
        dim_feedforward=128,
        num_layers=1,
        pre_norm=False,
        mask_dim=64,
        enforce_input_project=False,
        num_levels=1,
    )
    predictor.load_state_dict(weights)
    plain = PlainHead({f"sem_seg_head.predictor.{name}": v for name, v in weights.items()})
    for k in (2, 6):
        level, mask_features = data[f"exit{k}.map"], data[f"exit{k}.mask_features"]
        found = predictor([level], mask_features)
        for i, output in enumerate([*found["aux_outputs"], found]):
            for name, value in output.items():
                if name != "aux_outputs":
                    torch.testing.assert_close(value, data[f"exit{k}.aux{i}.{name}"], atol=1e-5, rtol=1e-5)
        for image in (0, 1):
            for i, output in enumerate(plain.predict([level[image].numpy()], mask_features[image].numpy())):
                for name, value in zip(("pred_logits", "pred_masks"), output):
                    np.testing.assert_allclose(value, data[f"exit{k}.aux{i}.{name}"][image], atol=1e-5)


@pytest.mark.parametrize("name", PARENTS)
def test_state_dict_has_the_published_names_and_shapes(name, oracle_json):
    model = build_on_meta(load_cfg(str(CONFIGS / PARENTS[name])))
    actual = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert actual == oracle_json("state_dicts.json")[name]
    if name in MILLION_PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLION_PARAMETERS[name], abs=5e-4)


@pytest.mark.parametrize("name", ["coco_r50", "coco_swin_t"])
def test_optimizer_groups_match_the_reference(name, oracle_json):
    from eco_m2f.engine.optimizer import parameter_groups

    cfg = load_cfg(str(CONFIGS / PARENTS[name]), ["MODEL.DEVICE", "cpu"])
    model = build_on_meta(cfg)
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
