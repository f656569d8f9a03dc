"""The contract of TRANSFORMER_ENCODER_REGISTRY, for every member by existing."""

import pytest
import torch
import torch.nn.functional as F
from minis import CONFIGS, MINI, PARENT

from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.encoders import TRANSFORMER_ENCODER_REGISTRY, build_transformer_encoder
from eco_m2f.modeling.encoders.msdeform import flatten_levels, reference_points, split_levels

SHAPES = [(2, 3), (4, 6), (8, 12)]


@pytest.fixture(scope="module", params=[name for name, _ in TRANSFORMER_ENCODER_REGISTRY])
def encoder(request):
    return from_options(request.param).eval()


def from_options(name: str, *opts):
    options = [*MINI, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME", name, *opts]
    return build_transformer_encoder(load_cfg(str(CONFIGS / PARENT), options))


def inputs(batch=2, dim=32):
    torch.manual_seed(0)
    maps = [torch.randn(batch, dim, h, w) for h, w in SHAPES]
    return maps, [torch.randn(1, dim, h, w) for h, w in SHAPES]


@torch.no_grad()
def test_returns_every_exit_with_the_shapes_of_its_input(encoder):
    maps, pos = inputs()
    out = encoder(maps, pos, encoder.exits)
    assert tuple(sorted(out)) == encoder.exits
    for k in encoder.exits:
        assert [m.shape for m in out[k]] == [m.shape for m in maps]
        assert all(m.isfinite().all() for m in out[k])


@torch.no_grad()
def test_an_exit_does_not_depend_on_which_others_are_asked_for(encoder):
    maps, pos = inputs()
    together = encoder(maps, pos, encoder.exits)
    for k in encoder.exits:
        alone = encoder(maps, pos, [k])
        assert list(alone) == [k]
        assert all(torch.equal(a, b) for a, b in zip(alone[k], together[k]))


@torch.no_grad()
def test_images_of_a_batch_do_not_meet(encoder):
    maps, pos = inputs()
    last = encoder.exits[-1]
    together = encoder(maps, pos, [last])[last]
    alone = encoder([m[1:] for m in maps], pos, [last])[last]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exit_k_runs_k_layers(encoder):
    ran = []
    layers = encoder.encoder.layers
    hooks = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    for k in encoder.exits:
        ran.clear()
        encoder(*inputs(), [k])
        assert len(ran) == len(set(ran)) == k
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_input_projections_make_maps_of_the_encoders_width(encoder):
    projection = encoder.input_projection(24).eval()
    assert projection(torch.randn(2, 24, 4, 6)).shape == (2, 32, 4, 6)
    assert isinstance(projection[0], torch.nn.Conv2d) and projection[0].kernel_size == (1, 1)


def test_unknown_exits_are_refused(encoder):
    maps, pos = inputs()
    for wrong in ([], [0], [encoder.exits[-1] + 1]):
        with pytest.raises(ValueError, match="exits"):
            encoder(maps, pos, wrong)


def test_an_encoder_without_layers_is_refused(encoder):
    with pytest.raises(ValueError, match="TRANSFORMER_ENC_LAYERS"):
        from_options(type(encoder).__name__, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0)


def test_every_parameter_up_to_an_exit_learns_from_it(encoder):
    maps, pos = inputs()
    last = encoder.exits[-1]
    sum(m.square().sum() for m in encoder(maps, pos, [last])[last]).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


def test_levels_survive_flattening():
    maps, _ = inputs()
    assert all(torch.equal(a, b) for a, b in zip(split_levels(flatten_levels(maps), SHAPES), maps))


def test_maps_of_a_single_image_are_known_to_lie_channels_last():
    """Strides of an axis of length 1 say nothing of where elements are, but decide how a map is resized."""
    tokens = torch.randn(1, sum(h * w for h, w in SHAPES), 32)
    for level in split_levels(tokens, SHAPES):
        assert F.interpolate(level, scale_factor=2, mode="bilinear").stride(1) == 1


def test_reference_points_are_pixel_centres_as_x_y():
    points = reference_points([(2, 4)], "cpu", torch.float32)[0, :, 0]
    assert points[0].tolist() == [1 / 8, 1 / 4]
    assert points[1].tolist() == [3 / 8, 1 / 4]
    assert points[4].tolist() == [1 / 8, 3 / 4]
