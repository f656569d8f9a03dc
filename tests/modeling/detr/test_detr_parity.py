"""DETR's head against numbers of the reference implementation, recorded with padding, at every exit."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from minis import CONFIGS, DETR
from safetensors.torch import load_file

from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.detr import DetrHead
from eco_m2f.modeling.layers import padded_sine_position, sine_position

EXITS = [2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def case(shared):
    """The head with the recorded weights, and the recorded numbers."""
    folder = shared / "oracle" / "detr_mini"
    case = json.loads((folder / "case.json").read_text())
    head = DetrHead(
        in_channels=case["in_channels"],
        num_classes=case["num_classes"],
        num_queries=case["num_queries"],
        dim=case["hidden_dim"],
        num_heads=case["nheads"],
        enc_layers=case["enc_layers"],
        dec_layers=case["dec_layers"],
        dim_feedforward=case["dim_feedforward"],
        dropout=case["dropout"],
    ).eval()
    head.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    return head, load_file(folder / "expected.safetensors")


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_exit_matches_the_reference(case):
    head, expected = case
    padding = expected["mask"].bool()
    assert padding.any() and not padding.flatten(1).all(1).any()
    features = {"res5": expected["src"], "padding": padding}
    (pos, _), states = head.encode(features, EXITS)
    close(pos, expected["pos"])
    preds = head.forward_exits(features, EXITS)
    for k in EXITS:
        close(states[k][0], expected[f"exit{k}.memory"])
        for name in ("pred_logits", "pred_boxes"):
            close(preds[k][name], expected[f"exit{k}.{name}"])


@torch.no_grad()
def test_an_auxiliary_output_is_that_of_a_shallower_decoder(case):
    head, expected = case
    features = {"res5": expected["src"], "padding": expected["mask"].bool()}
    shared, states = head.encode(features, head.exits[-1:])
    deep = head.decode(shared, states[head.exits[-1]])
    assert len(deep["aux_outputs"]) == 2 and set(head(features)) == {"pred_logits", "pred_boxes"}
    shallow = DetrHead(
        in_channels=48, num_classes=6, num_queries=10, dim=64, dec_layers=2, dim_feedforward=128, dropout=0.0
    ).eval()
    kept = {n: v for n, v in head.state_dict().items() if "decoder.layers.2" not in n}
    shallow.load_state_dict(kept, strict=True)
    for name, value in deep["aux_outputs"][1].items():
        close(shallow(features)[name], value)


def test_the_position_code_without_padding_is_the_parents():
    padding = torch.zeros(2, 5, 7, dtype=torch.bool)
    assert torch.equal(
        padded_sine_position(padding, 32), sine_position(5, 7, 32, torch.device("cpu")).expand(2, -1, -1, -1)
    )


def test_the_position_code_of_a_padded_image_is_that_of_the_image_alone():
    padding = torch.ones(1, 5, 7, dtype=torch.bool)
    padding[:, :3, :4] = False
    alone = sine_position(3, 4, 32, torch.device("cpu"))
    close(padded_sine_position(padding, 32)[:, :, :3, :4], alone)


def test_names_shapes_and_number_of_the_published_parameters(monkeypatch):
    """41.5 M parameters with published names; the backbone's names are detectron2's."""
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 91]
    model = build_model(load_cfg(str(CONFIGS / DETR), opts))
    assert sum(p.numel() for p in model.parameters()) == 41_524_768
    shapes = {n.removeprefix("detr."): list(v.shape) for n, v in model.state_dict().items() if n.startswith("detr.")}
    layer = {
        "self_attn.in_proj_weight": [768, 256],
        "self_attn.in_proj_bias": [768],
        "self_attn.out_proj.weight": [256, 256],
        "self_attn.out_proj.bias": [256],
        "linear1.weight": [2048, 256],
        "linear1.bias": [2048],
        "linear2.weight": [256, 2048],
        "linear2.bias": [256],
        **{f"norm{i}.{part}": [256] for i in (1, 2) for part in ("weight", "bias")},
    }
    cross = {n.replace("self_attn", "multihead_attn"): s for n, s in layer.items() if n.startswith("self_attn")}
    wanted = {f"transformer.encoder.layers.{i}.{n}": s for i in range(6) for n, s in layer.items()}
    decoder = {**layer, **cross, "norm3.weight": [256], "norm3.bias": [256]}
    wanted |= {f"transformer.decoder.layers.{i}.{n}": s for i in range(6) for n, s in decoder.items()}
    wanted |= {"transformer.decoder.norm.weight": [256], "transformer.decoder.norm.bias": [256]}
    wanted |= {"input_proj.weight": [256, 2048, 1, 1], "input_proj.bias": [256], "query_embed.weight": [100, 256]}
    wanted |= {"class_embed.weight": [92, 256], "class_embed.bias": [92]}
    for i, (size, out) in enumerate([(256, 256), (256, 256), (256, 4)]):
        wanted |= {f"bbox_embed.layers.{i}.weight": [out, size], f"bbox_embed.layers.{i}.bias": [out]}
    assert shapes == wanted
    assert {n.split(".")[0] for n in model.state_dict()} == {"backbone", "detr"}
