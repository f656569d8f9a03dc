"""tools/convert_backbone.py on generated files of the published layouts: Swin, MoBY, torchvision's ResNet, DINO."""

import argparse
import pickle
import re

import convert_backbone
import pytest
import torch
from minis import build, fill
from torchvision.models import resnet18, resnet50
from yacs.config import CfgNode

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.published import resnet_name
from eco_m2f.checkpoint.safe_load import CheckpointError

pytestmark = pytest.mark.slow

SWIN = "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_moby_bs16_50ep.yaml"
R50 = "coco/panoptic-segmentation/maskformer2_R50_dino_bs16_50ep.yaml"
MINI_SWIN = ["MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [2, 2, 2, 2], "MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8]]
FULL_R50 = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
FULL_R50 += ["MODEL.RESNETS.WIDTH_PER_GROUP", 64]


def convert(tmp_path, content: dict) -> str:
    """Converts a file of this content to weights.pkl. Returns the printed text."""
    torch.save(content, tmp_path / "source.pth")
    line = convert_backbone.convert(tmp_path / "source.pth", tmp_path / "weights.pkl")
    assert line.startswith(f"{tmp_path / 'weights.pkl'}: ")
    return line.partition(": ")[2]


def loaded(tmp_path, config: str, *opts) -> torch.nn.Module:
    """A small model with the converted weights in its backbone. Its other weights are unchanged."""
    torch.manual_seed(1)
    model = build(config, *opts)
    heads = {name: v.clone() for name, v in model.state_dict().items() if not name.startswith("backbone.")}
    Checkpointer(model).load(str(tmp_path / "weights.pkl"))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in heads.items())
    return model


@pytest.fixture(scope="module")
def swin() -> dict:
    """Small Swin weights with the original names: only the last of the output norms, masks, and a classifier."""
    backbone = fill(build(SWIN, *MINI_SWIN)).backbone
    weights = {k: v for k, v in backbone.state_dict().items() if not re.match(r"norm\d\.", k)}
    weights |= {"norm.weight": torch.zeros(96), "norm.bias": torch.zeros(96)}
    return weights | {f"layers.{i}.blocks.1.attn_mask": torch.zeros(4, 49, 49) for i in range(3)}


def assert_swin(model, swin: dict) -> None:
    """All tensors of the backbone are the file's, except its own norms, which are unchanged."""
    state = model.backbone.state_dict()
    norms = {name for name in state if re.match(r"norm\d\.", name)}
    assert len(norms) == 8 and len(state) > 100
    for name, value in state.items():
        expected = swin[name] if name not in norms else torch.full_like(value, name.endswith("weight"))
        assert torch.equal(value, expected), name
    assert any(name.endswith("relative_position_index") for name in state)


def test_swin(tmp_path, swin, caplog):
    line = convert(tmp_path, {"model": swin | {"head.weight": torch.zeros(9, 96), "head.bias": torch.zeros(9)}})
    assert line == f"Swin, {len(swin) - 5} tensors, 8 blocks; left out: head (2), layers (3), norm (2)"
    assert_swin(loaded(tmp_path, SWIN, *MINI_SWIN), swin)
    assert "8 backbone tensors keep their initial values" in caplog.text  # one norm for each map


def moby(swin: dict) -> dict:
    """A checkpoint of MoBY's training: the online and target encoders, their heads, the queue and the options."""
    weights = {f"encoder.{k}": v for k, v in swin.items()} | {f"encoder_k.{k}": v + 1 for k, v in swin.items()}
    weights |= {f"{name}.linear_hidden.0.weight": torch.zeros(4, 96) for name in ("projector", "projector_k")}
    weights |= {"predictor.linear_out.weight": torch.zeros(4, 4), "queue1": torch.zeros(4, 9), "queue2": torch.ones(4)}
    options = CfgNode({"MODEL": {"TYPE": "moby", "SWIN": {"DEPTHS": [2, 2, 2, 2]}}})
    options.freeze()
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"model": weights, "optimizer": optimizer, "epoch": 299, "config": options}


def test_of_moby_the_online_encoder_is_taken(tmp_path, swin):
    line = convert(tmp_path, moby(swin))
    assert line.startswith(f"MoBY's online Swin, {len(swin) - 5} tensors, 8 blocks; left out: encoder (5), ")
    assert f"encoder_k ({len(swin)}), predictor (1), projector (1), projector_k (1), queue1 (1), queue2 (1)" in line
    assert_swin(loaded(tmp_path, SWIN, *MINI_SWIN), swin)


def test_a_block_that_is_not_whole_is_told(tmp_path, swin):
    """Weights as of a Swin with batch norms before its MLP."""
    weights = {k: v for k, v in moby(swin)["model"].items() if ".norm2." not in k}
    with pytest.raises(
        CheckpointError, match=r"lacks 16 tensors of its blocks, such as layers.0.blocks.0.norm2.weight"
    ):
        convert(tmp_path, {"model": weights})
    assert not (tmp_path / "weights.pkl").exists()


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """torchvision's ResNet-50 with random weights and statistics, as DINO publishes it: without a classifier."""
    backbone = fill(resnet50()).eval().double()
    backbone.fc = torch.nn.Identity()
    return backbone


@torch.no_grad()
def assert_resnet(model, resnet: torch.nn.Module) -> None:
    """All four maps equal torchvision's."""
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    found = model.backbone.double()(x)
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for name, layer in zip(
        ("res2", "res3", "res4", "res5"), (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
    ):
        x = layer(x)
        torch.testing.assert_close(found[name], x, atol=1e-9, rtol=1e-9)


def test_dino_resnet(tmp_path, resnet, caplog):
    line = convert(tmp_path, resnet.float().state_dict())
    assert (
        line == "ResNet, 265 tensors, 16 blocks; left out: bn1 (1), layer1 (10), layer2 (13), layer3 (19), layer4 (10)"
    )
    model = loaded(tmp_path, R50, *FULL_R50)
    assert_resnet(model, resnet.double())
    assert len(model.backbone.state_dict()) == 265 and "keep their initial values" not in caplog.text


def test_of_a_full_checkpoint_of_dino_the_teacher_is_taken(tmp_path, resnet):
    teacher = {f"module.backbone.{k}": v for k, v in resnet.float().state_dict().items()}
    student = {k: torch.zeros_like(v) for k, v in teacher.items()}
    heads = {"module.head.last_layer.weight_g": torch.ones(5, 1), "module.head.mlp.0.weight": torch.ones(3, 3)}
    content = {"student": student | heads, "teacher": teacher | heads, "epoch": 800}
    content |= {"args": argparse.Namespace(arch="resnet50", lr=0.3), "dino_loss": {"center": torch.zeros(1, 5)}}
    line = convert(tmp_path, content)
    assert line == "DINO's ResNet, 265 tensors, 16 blocks; left out: backbone (53), head (2)"
    assert_resnet(loaded(tmp_path, R50, *FULL_R50), resnet.double())


def test_names():
    assert resnet_name("conv1.weight") == "stem.conv1.weight"
    assert resnet_name("bn1.running_mean") == "stem.conv1.norm.running_mean"
    assert resnet_name("layer4.2.bn3.bias") == "res5.2.conv3.norm.bias"
    assert resnet_name("layer2.0.downsample.0.weight") == "res3.0.shortcut.weight"
    assert resnet_name("layer2.0.downsample.1.weight") == "res3.0.shortcut.norm.weight"
    assert resnet_name("fc.bias") is None and resnet_name("layer1.0.bn1.num_batches_tracked") is None
    with pytest.raises(CheckpointError, match=re.escape("blocks.0.weight is no name of a ResNet")):
        resnet_name("blocks.0.weight")


def test_the_command_says_what_it_wrote(tmp_path, swin, capsys):
    torch.save(swin, tmp_path / "swin.pth")
    convert_backbone.main(
        convert_backbone.build_parser().parse_args([str(tmp_path / "swin.pth"), str(tmp_path / "swin.pkl")])
    )
    assert re.match(
        r".*swin.pkl: Swin, \d+ tensors, 8 blocks; left out: layers \(3\), norm \(2\)$", capsys.readouterr().out
    )
    assert pickle.loads((tmp_path / "swin.pkl").read_bytes())["matching_heuristics"] is True


def test_other_files_are_refused(tmp_path):
    contents = {
        "r18": (resnet18().state_dict(), r"r18.pth holds no known backbone .*: it holds bn1.bias, "),
        "dino_vit": (
            {"teacher": {"backbone.pos_embed": torch.zeros(2)}, "student": {}},
            r"dino_vit.pth holds no known backbone .*: it holds backbone.pos_embed, ",
        ),
        "list": ({"model": [1]}, 'holds no weights under "model", but a list'),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=message) as raised:
            convert_backbone.convert(tmp_path / f"{name}.pth", tmp_path / "a.pkl")
        assert "\n" not in str(raised.value) and not (tmp_path / "a.pkl").exists()
