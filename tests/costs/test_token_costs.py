"""GFLOPs of a DoViT by its tokens, against arithmetic by hand, and in closed form."""

import pytest
import torch
from minis import build
from torch import nn

from eco_m2f.costs import TokenCosts, module_flops
from eco_m2f.costs.closed_form import SizeCounts
from eco_m2f.modeling import DoViT
from eco_m2f.modeling.dovit.vit import TokenPassViT

DOVIT = "toy/dovit_toy.yaml"


def mini_vit() -> TokenPassViT:
    return TokenPassViT(patch_size=8, dim=24, depth=4, num_heads=3, image_size=32, decision_layers=(1, 3))


def test_a_layer_costs_its_products_and_norms():
    vit = mini_vit()
    costs = TokenCosts(vit, nn.Identity(), [], 5)
    for n in (1, 5, 60):  # qkv, proj and the MLP are 12 C^2; two products of attention; two norms of 5 per element
        assert costs.layer(n) == n * 12 * 24**2 + 2 * n * n * 24 + 2 * 5 * 24 * n
        assert module_flops(vit.blocks[0], (n, 24)) == costs.layer(n)


def test_static_vit_b_costs_what_is_known():
    """17.58 GFLOPs at 224 pixels: patches, 12 layers of 197 tokens, and the last norm."""
    with torch.device("meta"):
        vit = TokenPassViT(patch_size=16, dim=768, depth=12, num_heads=12, image_size=224, decision_layers=[2, 5, 8])
    resizing = 4 * 1 * 2 * 224 * 224 / 1e9
    found = TokenCosts(vit, nn.Identity(), [], 1)((224, 224), (224, 224)) - resizing
    by_hand = 196 * 768 * 3 * 256 + 12 * (197 * 12 * 768**2 + 2 * 197**2 * 768 + 10 * 197 * 768) + 5 * 197 * 768
    assert found == pytest.approx(by_hand / 1e9, rel=1e-9)
    assert found == pytest.approx(17.58, abs=0.005)


@pytest.mark.parametrize("head", ["MaskTransformerHead", "NaiveHead"])
def test_any_size_costs_what_its_modules_do(head, monkeypatch):
    """All sizes from the third on come from a closed form, which is learned from few sizes."""
    model = build(DOVIT, "MODEL.SEM_SEG_HEAD.NAME", head, mini=False)
    assert isinstance(model, DoViT)
    counted, around = [], TokenCosts.around
    monkeypatch.setattr(TokenCosts, "around", lambda self, size: counted.append(size) or around(self, size))
    costs = TokenCosts.of(model)
    sizes = [(64, 64), (88, 96), (8, 640), (512, 683 // 8 * 8), (96, 88), (1024, 2048)]
    found = [costs.parts(size, size) for size in sizes]
    assert len(set(counted)) == len(counted) <= 8 and (1024, 2048) not in counted
    monkeypatch.setattr(SizeCounts, "__call__", lambda self, size: self._count(size))
    assert found == [costs.parts(size, size) for size in sizes]
