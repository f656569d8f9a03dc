"""Costs, config, optimizer and checkpoints of a DoViT."""

import pytest
import torch
from dovit_models import CONFIG, MINI, STOP, mini_model, photos, stopping_model
from minis import CONFIGS, build

from eco_m2f.checkpoint.fits import architecture
from eco_m2f.costs import TokenCosts
from eco_m2f.evaluation.token_statistics import TokenStatistics


@pytest.mark.parametrize("head", ["MaskTransformerHead", "NaiveHead"])
def test_costs_of_an_image_by_hand(head):
    model = stopping_model("MODEL.SEM_SEG_HEAD.NAME", head)
    with torch.no_grad():
        (result,) = model(photos((30, 41)))
    told = TokenStatistics(TokenCosts.of(model)).row(photos((30, 41))[0], result)
    tokens, dim, classes, hidden = 24, 24, 5, 12
    layer = lambda n: 12 * n * dim**2 + 2 * n * n * dim + 10 * n * dim  # noqa: E731
    naive = tokens * (dim * hidden + 2 * hidden + hidden * classes)
    n = tokens + classes
    mask = tokens * dim**2 + 2 * layer(n) + 5 * n * dim + (tokens + classes) * dim**2 + tokens * classes * dim
    mask += 5 * tokens * classes
    around = tokens * dim * 3 * 64 + 5 * (tokens + 1) * dim + {"NaiveHead": naive, "MaskTransformerHead": mask}[head]
    around += 4 * classes * (32 * 48 + 40 * 50)
    counts = [tokens, *(round(share * tokens) for share in result["tokens"]["kept"])]
    layers = sum(number * layer(1 + n) for number, n in zip((1, 2, 1), counts))
    assert told["gflops"] == pytest.approx((around + layers + 2 * naive) / 1e9, rel=1e-9)
    assert told["static_gflops"] == pytest.approx((around + 4 * layer(1 + tokens)) / 1e9, rel=1e-9)
    assert told["threshold"] == STOP


def test_config_mistakes_are_told_at_build_time():
    for opts, message in (
        (("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True), "PANOPTIC_ON and INSTANCE_ON to False"),
        (("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False), "set SEMANTIC_ON to True"),
        (("MODEL.DOVIT.THRESHOLD", 0.0), "THRESHOLD 0.0 is no probability"),
        (("MODEL.DOVIT.THRESHOLD", 1.5), "THRESHOLD 1.5 is no probability"),
    ):
        with pytest.raises(ValueError, match=message):
            mini_model(*opts)


def test_position_code_and_cls_token_do_not_decay():
    from eco_m2f.engine.optimizer import parameter_groups
    from eco_m2f.engine.setup import load_cfg

    cfg = load_cfg(str(CONFIGS / CONFIG), [*MINI, "SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 1.0])
    model = mini_model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(cfg, model)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert found["backbone.pos_embed"] == found["backbone.cls_token"] == found["backbone.norm.weight"] == (0.1, 0.0)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (0.1, 0.05) and found["head.project.weight"] == (1.0, 0.05)


def test_a_checkpoint_tells_that_it_is_a_vit():
    assert architecture(mini_model().state_dict()) == {"backbone": "ViT", "backbone width": 24, "backbone blocks": 4}


@torch.no_grad()
def test_timms_weights_load_through_the_converter(tmp_path):
    """A whole ViT-Ti's weights load into the backbone, by their names."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    import convert_timm

    from eco_m2f.checkpoint.checkpointer import Checkpointer

    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(source.state_dict(), tmp_path / "source.pth")
    line = convert_timm.convert("vit_tiny_patch16_224", tmp_path / "weights.pkl", str(tmp_path / "source.pth"))
    assert "PIXEL_MEAN [127.5, 127.5, 127.5]" in line
    tiny = ["MODEL.DOVIT.PATCH_SIZE", 16, "MODEL.DOVIT.EMBED_DIM", 192, "MODEL.DOVIT.DEPTH", 12]
    tiny += ["MODEL.DOVIT.PRETRAIN_IMG_SIZE", 224]
    model = build(CONFIG, *tiny, mini=False)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    Checkpointer(model).load(str(tmp_path / "weights.pkl"))
    x = torch.randn(1, 3, 224, 224)
    expected = source.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(model.backbone(x)[0], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
