"""Tokens that stop: which, when, and what becomes of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from dovit_models import drawn_rule, masked_layer, mini_model, mini_vit, photos, stopping_model
from torch import nn

from eco_m2f.costs import TokenCosts
from eco_m2f.evaluation.token_statistics import TokenStatistics
from eco_m2f.modeling.dovit.dovit import AuxiliaryRule
from eco_m2f.modeling.dovit.vit import TokenPassViT, run_kept, summarise


def slow_vit(vit: TokenPassViT, image: torch.Tensor, said: list[torch.Tensor]) -> torch.Tensor:
    """The last map [C, h, w] of one image [3, H, W]; decisions stop tokens by masks."""
    x = vit.embed(image[None])[0]
    kept = torch.ones(len(x), dtype=torch.bool)
    for i, block in enumerate(vit.blocks):
        if i in (1, 3):
            kept[1:] &= ~said[(1, 3).index(i)].flatten()
            stopped = x[~kept]
            if len(stopped) > 0.1 * (len(x) - 1):
                x = torch.cat(((x[:1] + stopped.mean(0, keepdim=True)) / 2, x[1:]))
        x = masked_layer(block, x, kept)
    return vit.norm(x)[1:].T.unflatten(1, said[0].shape)


@torch.no_grad()
def test_stopping_is_what_masks_would_do():
    """Packed tokens of a batch, whose images keep different numbers, against masks over all tokens of each image."""
    vit, stop = mini_vit(), drawn_rule()
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found, passed = vit(images, stop)
    assert len({int(n) for n in passed[0].flatten(1).sum(1)}) > 1
    for i in range(3):
        expected = slow_vit(vit, images[i], [said[i] for said in stop.said])
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_that_has_stopped_never_goes_on():
    _, passed = mini_vit(decisions=(1, 2, 3))(torch.randn(2, 3, 32, 32), stop := drawn_rule(share=0.3))
    kept = torch.ones_like(passed[0])
    for after, said in zip(passed, stop.said, strict=True):
        kept &= ~said
        assert torch.equal(after, kept)
    assert (stop.said[0] & ~stop.said[1]).any()  # the second decision alone would restart some stopped tokens


@torch.no_grad()
def test_stopped_tokens_keep_their_value_and_the_map_is_restored():
    """Heads and later decisions get full maps, with each token in its place."""
    vit, stop = mini_vit(), drawn_rule()
    found, passed = vit(torch.randn(2, 3, 32, 48), stop)
    at_first, at_second = (vit.norm(m.movedim(1, -1)) for m in stop.seen)  # [B, h, w, C]
    last = found.movedim(1, -1)
    assert found.shape == (2, 24, 4, 6) and stop.seen[1].shape == (2, 24, 4, 6)
    first, second = ~passed[0], ~passed[1] & passed[0]
    assert torch.equal(at_second[first], at_first[first]) and torch.equal(last[first], at_first[first])
    assert torch.equal(last[second], at_second[second]) and second.any()
    assert (last[passed[1]] != at_second[passed[1]]).any(dim=-1).all()


@torch.no_grad()
def test_the_cls_token_goes_on_alone_where_all_others_have_stopped():
    blocks, tokens = mini_vit().blocks, torch.randn(2, 7, 24)
    kept = torch.tensor([[False] * 6, [True, False] * 3])
    found = run_kept(blocks, tokens, kept)
    alone = tokens[0, :1]
    for block in blocks:
        alone = masked_layer(block, alone, torch.tensor([True]))
    torch.testing.assert_close(found[0, :1], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0, 1:], tokens[0, 1:]) and torch.equal(found[1, 2::2], tokens[1, 2::2])
    assert not torch.equal(found[1, 0], tokens[1, 0])


def test_cls_takes_the_mean_of_the_stopped_in_beyond_a_tenth():
    tokens = torch.randn(3, 21, 4)
    kept = torch.ones(3, 20, dtype=torch.bool)
    kept[0, [3, 8]] = False  # exactly a tenth
    kept[1, [3, 8, 9]] = False
    found = summarise(tokens, kept)
    expected = tokens.clone()
    expected[1, 0] = (tokens[1, 0] + (tokens[1, 4] + tokens[1, 9] + tokens[1, 10]) / 3) / 2
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 2]], tokens[[0, 2]])


def test_the_rule_stops_what_its_head_is_surer_of_than_the_threshold():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1] = torch.tensor([math.log(9.0), math.log(9.2), -math.log(9.2)])  # 0.9, more, more of the other class
    rule = AuxiliaryRule([nn.Identity(), lambda x: 2 * x], 0.901)
    assert rule(0, logits).tolist() == [[[False, True, True]]]
    assert rule(1, logits).all()  # each decision point has its own head
    assert len(rule.logits) == 2 and rule.logits[0] is logits
    certain = torch.tensor([1000.0, 0.0]).view(1, 2, 1, 1)
    assert not AuxiliaryRule([nn.Identity()], 1.0)(0, certain).any()  # a probability of exactly 1 does not exceed 1


@torch.no_grad()
def test_threshold_one_is_the_static_model_exactly():
    """Bit for bit, with decisions and without them."""
    model, inputs = mini_model("MODEL.DOVIT.THRESHOLD", 1.0), photos((32, 48), (32, 48))
    images = model.preprocess(inputs).tensor
    static, _ = model.backbone(images)
    deciding, passed = model.backbone(images, AuxiliaryRule(model.auxiliary_heads, 1.0))
    assert torch.equal(static, deciding) and all(p.all() for p in passed)
    results = model(inputs)
    logits = F.interpolate(model.head(static), (32, 48), mode="bilinear")
    expected = F.interpolate(logits, (40, 50), mode="bilinear")
    for i, (x, r) in enumerate(zip(inputs, results)):
        assert torch.equal(r["sem_seg"], expected[i])
        assert r["tokens"]["kept"] == [1.0, 1.0]
        tokens = TokenStatistics(TokenCosts.of(model)).row(x, r)
        assert tokens["gflops"] == tokens["static_gflops"]


@pytest.mark.parametrize("head", ["MaskTransformerHead", "NaiveHead"])
@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone(head):
    """The images of a batch have different sizes and keep different numbers of tokens."""
    model = stopping_model("MODEL.SEM_SEG_HEAD.NAME", head)
    inputs = photos((32, 48), (30, 41), (20, 56), (32, 48))
    together = model(inputs)
    kept = [r["tokens"]["kept"] for r in together]
    assert kept[0] != kept[3] and all(1 > k[0] > k[1] > 0 for k in kept)
    for x, result in zip(inputs, together, strict=True):
        (alone,) = model([x])
        assert alone["tokens"] == result["tokens"]
        assert result["sem_seg"].shape == (5, 40, 50)
        torch.testing.assert_close(result["sem_seg"], alone["sem_seg"], atol=1e-5, rtol=1e-5)
