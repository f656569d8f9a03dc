"""The contract of TRANSFORMER_ENCODER_REGISTRY, for all members."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from minis import CONFIGS, MINI, PARENT

from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.encoders import TRANSFORMER_ENCODER_REGISTRY, build_transformer_encoder
from eco_m2f.modeling.encoders.msdeform import flatten_levels, reference_points, split_levels

SHAPES = [(2, 3), (4, 6), (8, 12)]


STAGES = ("ProScaleEncoder", "MODEL.PROSCALE.EXIT_AFTER_STAGES", True)
VARIANTS = {name: (name,) for name, _ in TRANSFORMER_ENCODER_REGISTRY} | {"ProScaleEncoder, all stages": STAGES}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def encoder(request):
    return from_options(*request.param).eval()


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


@contextmanager
def layer_calls(encoder):
    """A list that gets (number of the layer, images) at each call of a layer."""
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, i=i: ran.append((i, len(given(args)))))
        for i, layer in enumerate(encoder.encoder.layers)
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def given(args) -> torch.Tensor:
    """A layer's input: tokens, or the first of its maps."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


@torch.no_grad()
def test_exit_k_runs_k_layers(encoder):
    for k in encoder.exits:
        with layer_calls(encoder) as ran:
            encoder(*inputs(), [k])
        assert len(ran) == len(set(ran)) == k


def steps(encoder, state, exits) -> dict:
    """{exit: maps} of a run that stops at these exits."""
    found = {}
    for k in exits:
        state, found[k] = encoder.advance(state, k)
    return found


@torch.no_grad()
def test_step_by_step_is_one_go(encoder):
    """Bit for bit, from each exit on. A state does not change, so another run can go on from it."""
    maps, pos = inputs()
    wanted = encoder(maps, pos, encoder.exits)
    state = encoder.start(maps, pos)
    for i, k in enumerate(encoder.exits):
        for _ in range(2):
            assert_equal(steps(encoder, state, encoder.exits[i:]), wanted, encoder.exits[i:])
            assert_equal(steps(encoder, state, encoder.exits[-1:]), wanted, encoder.exits[-1:])
        state, _ = encoder.advance(state, k)
        assert state.exit == k


def assert_equal(found: dict, wanted: dict, exits) -> None:
    assert tuple(found) == tuple(exits)
    for k in exits:
        assert all(torch.equal(a, b) for a, b in zip(found[k], wanted[k], strict=True))


@torch.no_grad()
def test_no_layer_runs_twice_or_in_vain(encoder):
    """Only the last layer may run again, if it belongs to each exit."""
    with layer_calls(encoder) as together:
        encoder(*inputs(), encoder.exits)
    with layer_calls(encoder) as one_by_one:
        steps(encoder, encoder.start(*inputs()), encoder.exits)
    with layer_calls(encoder) as first:
        encoder(*inputs(), encoder.exits[:1])
    assert together == one_by_one
    last, count = len(encoder.encoder.layers) - 1, Counter(i for i, _ in together)
    assert sorted(count) == list(range(encoder.exits[-1]))
    assert all(n == 1 for i, n in count.items() if i != last)
    assert count[last] == (len(encoder.exits) if last in [i for i, _ in first] else 1)


@torch.no_grad()
def test_images_that_left_cost_nothing_more(encoder):
    maps, pos = inputs(batch=4)
    stay = torch.tensor([0, 3])
    wanted = encoder([m[stay] for m in maps], pos, encoder.exits)
    for i, k in enumerate((0, *encoder.exits[:-1])):
        state = encoder.start(maps, pos)
        state = encoder.advance(state, k)[0] if k else state
        with layer_calls(encoder) as ran:
            found = steps(encoder, state.take(stay), encoder.exits[i:])
        assert ran and {images for _, images in ran} == {2}
        for exit, levels in found.items():
            for a, b in zip(levels, wanted[exit], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_only_exits_ahead_can_be_gone_on_to(encoder):
    state, _ = encoder.advance(encoder.start(*inputs()), encoder.exits[-1])
    for wrong in (0, encoder.exits[-1], encoder.exits[-1] + 1):
        with pytest.raises(ValueError, match=f"exit {wrong} asked of a run at {encoder.exits[-1]}"):
            encoder.advance(state, wrong)


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
    """The stride of an axis of length 1 does not matter for the elements, but it decides how a map is resized."""
    tokens = torch.randn(1, sum(h * w for h, w in SHAPES), 32)
    for level in split_levels(tokens, SHAPES):
        assert F.interpolate(level, scale_factor=2, mode="bilinear").stride(1) == 1


def test_reference_points_are_pixel_centres_as_x_y():
    points = reference_points([(2, 4)], "cpu", torch.float32)[0, :, 0]
    assert points[0].tolist() == [1 / 8, 1 / 4]
    assert points[1].tolist() == [3 / 8, 1 / 4]
    assert points[4].tolist() == [1 / 8, 3 / 4]
