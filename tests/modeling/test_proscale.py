"""PRO-SCALE's encoder: its stages are encoders of fewer levels, and its exits are shorter PRO-SCALE encoders."""

import pytest
import torch
from minis import CONFIGS, MINI, PARENT, PROSCALE, fill

from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.encoders import MSDeformEncoder, ProScaleEncoder, build_transformer_encoder

SHAPES = [(2, 3), (4, 6), (8, 12)]
DIM = 32
LAYERS = "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"


def proscale(*stages: int, temperature: float | None = 0.1, exit_after_stages: bool = False, dim: int = DIM):
    return ProScaleEncoder(stages=stages, temperature=temperature, exit_after_stages=exit_after_stages, dim=dim).eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, DIM, *s) for s in SHAPES], [torch.randn(1, DIM, *s) for s in SHAPES]


def close(actual, wanted) -> None:
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def stage_alone(encoder: ProScaleEncoder, first: int, layers: int, levels: int) -> MSDeformEncoder:
    """The parent's encoder on the coarsest levels, with a stage's weights."""
    alone = MSDeformEncoder(dim=DIM, num_layers=layers, num_levels=levels).eval()
    alone.level_embed.data = encoder.level_embed.data[:levels]
    for i, layer in enumerate(alone.encoder.layers):
        layer.load_state_dict(encoder.encoder.layers[first + i].state_dict())
    return alone


def score(encoder: ProScaleEncoder, finest: torch.Tensor, size) -> torch.Tensor:
    """The 256 -> 1 projection of the finest map, then resized. Both are linear, so their order does not matter."""
    plane = torch.einsum("bchw,c->bhw", finest, encoder.recalibration.weight[0]) + encoder.recalibration.bias
    step = finest.shape[-1] // size[1]
    middle = [i for i in range(step) if step // 2 - 1 <= i <= step // 2]  # bilinear: halfway between these two
    blocks = plane.unflatten(2, (size[1], step)).unflatten(1, (size[0], step))  # [B, h, step, w, step]
    return blocks[:, :, middle][..., middle].mean((2, 4))[:, None]


@pytest.mark.parametrize("temperature", [None, 0.1, 2.0])
@torch.no_grad()
def test_stages_are_encoders_of_fewer_levels(inputs, temperature):
    encoder = fill(proscale(1, 2, 2, temperature=temperature, exit_after_stages=True))
    maps, pos = inputs
    res5, res4, res3 = maps
    if temperature is not None:
        res5 = res5 * torch.sigmoid(temperature * score(encoder, res3, SHAPES[0]))
        res4 = res4 * torch.sigmoid(temperature * score(encoder, res3, SHAPES[1]))
    first = stage_alone(encoder, 0, 1, 1)([res5], pos[:1], [1])[1]
    second = stage_alone(encoder, 1, 2, 2)([*first, res4], pos[:2], [2])[2]
    third = stage_alone(encoder, 3, 2, 3)([*second, res3], pos, [1, 2])
    found = encoder(maps, pos, [1, 3, 4, 5])
    close(found[1], [*first, maps[1], maps[2]])  # levels that have not joined are projections, not recalibrated
    close(found[3], [*second, maps[2]])
    close(found[4], third[1])
    close(found[5], third[2])


@torch.no_grad()
def test_with_all_layers_in_the_last_stage_it_is_the_parents_encoder(inputs):
    encoder = fill(proscale(0, 0, 6, temperature=None))
    parent = MSDeformEncoder(dim=DIM, num_layers=6).eval()
    parent.load_state_dict(encoder.state_dict(), strict=True)
    assert encoder.exits == parent.exits
    ours, theirs = encoder(*inputs, [2, 6]), parent(*inputs, [2, 6])
    for k in (2, 6):
        assert all(torch.equal(a, b) for a, b in zip(ours[k], theirs[k]))


@torch.no_grad()
def test_an_exit_of_the_last_stage_is_an_encoder_of_that_many_layers(inputs):
    encoder, shorter = fill(proscale(2, 1, 3)), proscale(2, 1, 1)
    state = encoder.state_dict()
    shorter.load_state_dict({n: state[n] for n in shorter.state_dict()}, strict=True)
    close(encoder(*inputs, [4])[4], shorter(*inputs, [4])[4])


@pytest.mark.parametrize(
    "stages, last_stage, all_stages",
    [
        ((3, 3, 3), (7, 8, 9), (3, 6, 7, 8, 9)),
        ((1, 1, 1), (3,), (1, 2, 3)),
        ((2, 0, 2), (3, 4), (2, 3, 4)),
        ((0, 2, 1), (3,), (2, 3)),
    ],
)
def test_exits(stages, last_stage, all_stages):
    assert proscale(*stages).exits == last_stage
    assert proscale(*stages, exit_after_stages=True).exits == all_stages


def test_parameters_of_a_layer_by_its_levels():
    encoder = proscale(1, 1, 1, dim=256)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in encoder.encoder.layers]
    assert counts == [658_176 + 24_672 * levels for levels in (1, 2, 3)]
    others = sum(p.numel() for p in encoder.parameters()) - sum(counts)
    assert others == 3 * 256 + 257  # level embedding, and the head of recalibration


def from_options(*opts) -> ProScaleEncoder:
    return build_transformer_encoder(load_cfg(str(CONFIGS / PARENT), [*MINI, *PROSCALE, *opts]))


@pytest.mark.parametrize(
    "opts, look",
    [
        (("STAGES", (1, 2, 3)), lambda e: e.layer_levels),
        (("RECALIBRATE", False), lambda e: len(list(e.parameters()))),
        (("TEMPERATURE", 0.5), lambda e: e.temperature),
        (("EXIT_AFTER_STAGES", True), lambda e: e.exits),
    ],
)
def test_every_key_changes_the_encoder(opts, look):
    key, value = opts
    assert look(from_options()) != look(from_options(f"MODEL.PROSCALE.{key}", value))


@pytest.mark.parametrize(
    "stages, layers, message",
    [
        ((2, 2, 2), 9, "are 6 layers, but TRANSFORMER_ENC_LAYERS is 9: set it to 6"),
        ((3, 3), 6, "must be 3 numbers"),
        ((3, 3, 0), 6, r"\[3, 3, 0\]: each stage needs at least 0 layers, the last at least 1"),
        ((7, -3, 2), 6, r"\[7, -3, 2\]: each stage needs at least 0 layers"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, layers, message):
    with pytest.raises(ValueError, match=message):
        from_options("MODEL.PROSCALE.STAGES", stages, LAYERS, layers)
