"""Lite-M2F's encoder: a cheap layer equals a full layer, after which the finest level gets its old tokens back."""

import pytest
import torch
from minis import LITE, PARENT, build, fill

from eco_m2f.modeling.encoders import LiteEncoder, MSDeformEncoder
from eco_m2f.modeling.encoders.msdeform import flatten_levels, reference_points, split_levels

SHAPES = [(2, 3), (4, 6), (8, 12)]
DIM = 32


@pytest.fixture(scope="module")
def encoder():
    return fill(LiteEncoder(dim=DIM, num_layers=6)).eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, DIM, *s) for s in SHAPES], [torch.randn(1, DIM, *s) for s in SHAPES]


@torch.no_grad()
def test_every_exit_is_made_of_full_layers_with_the_finest_level_put_back(encoder, inputs):
    maps, pos = inputs
    tokens = flatten_levels(maps)
    pos_tokens = flatten_levels([p + e[:, None, None] for p, e in zip(pos, encoder.level_embed)])
    reference = reference_points(SHAPES, "cpu", torch.float32)
    coarse = 2 * 3 + 4 * 6
    *cheap, last = encoder.encoder.layers
    found = encoder(maps, pos, encoder.exits)
    for k in range(1, 7):
        if k > 1:
            refined = cheap[k - 2](tokens, pos_tokens, reference, SHAPES)
            tokens = torch.cat((refined[:, :coarse], tokens[:, coarse:]), dim=1)
        wanted = split_levels(last(tokens, pos_tokens, reference, SHAPES), SHAPES)
        for actual, level in zip(found[k], wanted, strict=True):
            torch.testing.assert_close(actual, level, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [2, 5])
@torch.no_grad()
def test_an_exit_is_an_encoder_of_its_own_layers(encoder, inputs, k):
    shallow = LiteEncoder(dim=DIM, num_layers=k).eval()
    shallow.level_embed = encoder.level_embed
    for mine, layer in zip(shallow.encoder.layers, [*encoder.encoder.layers[: k - 1], encoder.encoder.layers[-1]]):
        mine.load_state_dict(layer.state_dict())
    for a, b in zip(shallow(*inputs, [k])[k], encoder(*inputs, [k])[k]):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@torch.no_grad()
def test_the_cheap_layers_run_once_for_all_exits_on_the_coarse_levels_alone(encoder, inputs):
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, i=i: ran.append((i, args[0].shape[1])))
        for i, layer in enumerate(encoder.encoder.layers)
    ]
    encoder(*inputs, [2, 4])
    for hook in hooks:
        hook.remove()
    assert sorted(ran) == [(0, 30), (1, 30), (2, 30), (5, 126), (5, 126)]


def test_weights_are_those_of_the_parents_encoder(encoder):
    parent = MSDeformEncoder(dim=DIM, num_layers=6)
    assert {n: v.shape for n, v in encoder.state_dict().items()} == {n: v.shape for n, v in parent.state_dict().items()}


def test_a_parents_checkpoint_fits():
    lite = build(PARENT, *LITE)
    assert isinstance(lite.sem_seg_head.pixel_decoder.transformer, LiteEncoder)
    lite.load_state_dict(build(PARENT).state_dict(), strict=True)
