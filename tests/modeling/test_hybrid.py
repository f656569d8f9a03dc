"""RT-M2F's encoder: against the reference implementation, PyTorch's own layer, and its blocks after fusing."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from minis import CONFIGS, MINI, PARENT, RT, build, fill, make_batch
from safetensors.torch import load_file
from torch import nn

from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.modeling.encoders.dense import EncoderLayer
from eco_m2f.modeling.encoders.hybrid import (
    HybridEncoder,
    RepVGGBlock,
    doubled,
    fuse_for_deployment,
    plane_position,
)

SHAPES = [(2, 3), (4, 6), (8, 12)]


@pytest.fixture(scope="module")
def encoder():
    return fill(HybridEncoder(dim=32)).eval()


def maps(batch: int = 2):
    torch.manual_seed(0)
    return [torch.randn(batch, 32, *s) for s in SHAPES]


@torch.no_grad()
def test_it_matches_the_reference(shared):
    folder = shared / "oracle" / "hybrid_mini"
    case = json.loads((folder / "case.json").read_text())
    weights, data = load_file(folder / "weights.safetensors"), load_file(folder / "expected.safetensors")
    dim = case["hidden_dim"]
    encoder = HybridEncoder(dim=dim, num_heads=case["nheads"], dim_feedforward=case["dim_feedforward"])
    projections = nn.ModuleList(encoder.input_projection(c) for c in case["in_channels"])  # fine to coarse
    encoder, projections = encoder.eval(), projections.eval()
    part = "input_proj."
    projections.load_state_dict({n.removeprefix(part): v for n, v in weights.items() if n.startswith(part)})
    others = {n.replace("encoder.0.", "encoder."): v for n, v in weights.items() if not n.startswith(part)}
    encoder.load_state_dict(others, strict=True)
    strides = (32, 16, 8)
    inputs = [projections[2 - i](data[f"in.stride{s}"]) for i, s in enumerate(strides)]
    for fused in (False, True):
        for actual, stride in zip(encoder(inputs, None, [1])[1], strides, strict=True):
            torch.testing.assert_close(actual, data[f"out.stride{stride}"], atol=1e-5, rtol=1e-5)
        fuse_for_deployment(encoder)


@torch.no_grad()
def test_fused_blocks_give_the_same(encoder):
    fused = fuse_for_deployment(copy.deepcopy(encoder))
    blocks = [m for m in fused.modules() if isinstance(m, RepVGGBlock)]
    assert len(blocks) == 4 * 3 and all(len(list(b.parameters())) == 2 for b in blocks)
    for a, b in zip(fused(maps(), None, [1])[1], encoder(maps(), None, [1])[1]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    again = fuse_for_deployment(fused).state_dict()
    assert again.keys() == fused.state_dict().keys()


def test_a_model_in_training_is_not_fused(encoder):
    with pytest.raises(RuntimeError, match="eval"):
        fuse_for_deployment(copy.deepcopy(encoder).train())


@torch.no_grad()
def test_a_predictor_is_fused_and_says_what_the_model_does(tmp_path, monkeypatch):
    model = fill(build(PARENT, *RT))
    classes = [{"id": i, "name": f"thing {i}", "isthing": 1, "color": [i, i, i]} for i in range(7)]
    torch.save({"model": model.state_dict(), "classes": classes}, tmp_path / "rt.pth")
    seen = []
    original = RepVGGBlock.forward
    monkeypatch.setattr(RepVGGBlock, "forward", lambda self, x: seen.append(self.fused) or original(self, x))
    opts = [*MINI, *RT, "MODEL.WEIGHTS", str(tmp_path / "rt.pth"), "INPUT.MIN_SIZE_TEST", 0]
    image = make_batch()[0]["image"]
    result = load_predictor(str(CONFIGS / PARENT), opts)(image.permute(1, 2, 0).numpy())
    assert len(seen) == 12 and None not in seen
    wanted = model([{"image": image, "height": 64, "width": 96}])[0]
    assert seen[12:] == [None] * 12
    torch.testing.assert_close(result["sem_seg"], wanted["sem_seg"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_is_pytorchs_encoder_layer_where_there_is_no_position():
    layer = fill(EncoderLayer(16, 4, 24, 0.0, F.gelu)).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, activation="gelu", batch_first=True).eval()
    theirs.load_state_dict(layer.state_dict(), strict=True)
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(layer(tokens, torch.zeros(7, 16)), theirs(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_position_enters_queries_and_keys_but_not_values():
    """The layer is written out here, with one head."""
    layer = fill(EncoderLayer(16, 1, 24, 0.0, F.gelu)).eval()
    tokens, pos = torch.randn(1, 5, 16), torch.randn(5, 16)
    w_q, w_k, w_v = layer.self_attn.in_proj_weight.split(16)
    b_q, b_k, b_v = layer.self_attn.in_proj_bias.split(16)
    x = tokens[0]
    weights = ((F.linear(x + pos, w_q, b_q) @ F.linear(x + pos, w_k, b_k).T) / 4).softmax(-1)
    x = layer.norm1(x + layer.self_attn.out_proj(weights @ F.linear(x, w_v, b_v)))
    x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
    torch.testing.assert_close(layer(tokens, pos)[0], x, atol=1e-5, rtol=1e-5)


def test_position_code_runs_over_the_tokens_as_they_lie():
    code = plane_position(2, 3, 8, "cpu")
    assert code.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            angles = [[n / 10000 ** (i / 2) for i in range(2)] for n in (row, column)]
            wanted = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
            np.testing.assert_allclose(code[3 * row + column], wanted, atol=1e-6)


def test_doubling_is_nearest_neighbour():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(doubled(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@torch.no_grad()
def test_every_scale_reaches_every_other(encoder):
    """A change of one map changes all three maps of the result."""
    before = encoder(maps(), None, [1])[1]
    for level in range(3):
        changed = maps()
        changed[level] = changed[level] + 1
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(encoder(changed, None, [1])[1], before))


def test_it_has_one_exit(encoder):
    assert encoder.exits == (1,)
    with pytest.raises(ValueError, match=r"offers \[1\]"):
        encoder(maps(), None, [2])
    with pytest.raises(ValueError, match="is beyond"):
        build("coco/panoptic-segmentation/eco/eco_maskformer2_R50_bs16_50ep.yaml", *RT)


def test_norm_is_that_of_the_config():
    for norm, kind in (("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)):
        encoder = HybridEncoder(dim=32, norm=norm)
        norms = [m for m in nn.Sequential(encoder, encoder.input_projection(8)).modules() if hasattr(m, "running_mean")]
        assert len(norms) == 2 + 2 + 4 * (2 + 3 * 2) + 1 and {type(m) for m in norms} == {kind}
    with pytest.raises(ValueError, match="MODEL.HYBRID.NORM 'GN' is unknown; use BN or SyncBN"):
        build(PARENT, *RT, "MODEL.HYBRID.NORM", "GN")


def test_without_a_gpu_sync_bn_becomes_bn():
    cfg = load_cfg(str(CONFIGS / PARENT), [*MINI, *RT, "MODEL.HYBRID.NORM", "SyncBN"])
    norms = {type(m) for m in build_model(cfg).sem_seg_head.modules() if hasattr(m, "running_mean")}
    assert norms == {nn.BatchNorm2d}


def test_a_width_that_the_position_code_cannot_have_is_refused():
    with pytest.raises(ValueError, match="CONVS_DIM 30 must be a multiple of 4"):
        HybridEncoder(dim=30)


def test_maps_that_do_not_double_are_refused(encoder):
    """A dilated backbone has such maps."""
    maps = [torch.zeros(1, 32, h, w) for h, w in ((4, 6), (4, 6), (8, 12))]
    with pytest.raises(ValueError, match=r"double in size .* not \[\(4, 6\), \(4, 6\), \(8, 12\)\].*OUTPUT_STRIDE 32"):
        encoder(maps, maps, encoder.exits)
