"""How the launches of the CUDA kernels are cut and indexed, at sizes that need no memory.

test_ms_deform_attn.py tests their results, with the other backends.
"""

import ctypes

import cuda_on_host
import pytest
import torch
from op_cases import make_case, run

pytestmark = pytest.mark.slow

SIZES = ("batch", "tokens", "heads", "channels", "queries", "levels", "points")
SHAPE_A = {"batch": 1, "tokens": 43008, "heads": 8, "channels": 32, "queries": 43008, "levels": 3, "points": 4}


def sizes(**changes):
    return cuda_on_host.ints((SHAPE_A | changes)[name] for name in SIZES)


def plan(vector=4, element_bytes=4, fused=False, **changes) -> dict:
    """The plan of a launch. Raises ValueError with the quantity that is too large."""
    result = cuda_on_host.ints([0] * 4)
    error = cuda_on_host.library().host_plan(
        sizes(**changes), ctypes.c_int64(vector), ctypes.c_int64(element_bytes), int(fused), result
    )
    if error:
        raise ValueError(error.decode())
    return dict(zip(("lanes", "tile", "blocks", "fixed"), result))


@pytest.mark.parametrize("vector, element_bytes, lanes", ((4, 4, 8), (8, 2, 4), (2, 8, 16), (1, 4, 32)))
def test_plan_of_mask2former(vector, element_bytes, lanes):
    made = plan(vector, element_bytes)
    units = 96 // lanes
    assert made["lanes"] == lanes and made["fixed"] == 1
    assert made["blocks"] == -(-43008 * 8 // units)
    assert made["tile"] == min(12, 288 // units)


@pytest.mark.parametrize("change", ({"heads": 4}, {"channels": 64}, {"levels": 4}, {"points": 8}))
def test_other_sizes_take_the_general_kernel(change):
    assert plan(**change)["fixed"] == 0


@pytest.mark.parametrize("channels", (1, 3, 4, 36, 127, 128, 1000))
def test_lanes_divide_the_block_and_stay_in_a_warp(channels):
    made = plan(1, 4, channels=channels)
    assert 96 % made["lanes"] == 0 and made["lanes"] <= 32
    assert made["lanes"] >= min(channels, 32)
    assert 96 // made["lanes"] * made["tile"] <= 288 and made["tile"] >= 1


@pytest.mark.parametrize("levels, points, lanes", ((3, 4, 4), (4, 4, 8), (4, 8, 16), (8, 12, 32)))
def test_fused_tile_holds_all_samples_of_a_softmax(levels, points, lanes):
    made = plan(8, 2, fused=True, levels=levels, points=points)
    assert made["tile"] == levels * points and made["lanes"] == lanes


def test_fused_plan_refuses_more_samples():
    with pytest.raises(ValueError, match="more than 96"):
        plan(fused=True, levels=16, points=7)


def test_image_strides_beyond_32_bits():
    """At 195 images the output of shape A exceeds 2^31 elements; with a stride-4 level the locations do at 48."""
    strides = cuda_on_host.ints([0] * 3)
    cuda_on_host.library().host_strides(sizes(batch=195), strides)
    assert list(strides) == [43008 * 256, 43008 * 256, 43008 * 8 * 12]
    large = {"tokens": 174080, "queries": 3_000_000, "levels": 16, "points": 16}
    cuda_on_host.library().host_strides(sizes(**large), strides)
    assert list(strides) == [174080 * 256, 3_000_000 * 256, 3_000_000 * 8 * 256]  # the last: 6.1e9


@pytest.mark.parametrize("block, image", ((0, 0), (7, 3), (28_671, 65_534)))
def test_first_point_of_a_block_beyond_32_bits(block, image):
    """A block has 12 units of 12 points. The last case is point 2.7e11."""
    first = cuda_on_host.library().host_first_point(sizes(), ctypes.c_int64(block), ctypes.c_int64(image))
    assert first == (image * 43008 * 8 + block * 12) * 12


@pytest.mark.parametrize(
    "change, message",
    (
        ({"tokens": 2**31}, "tokens"),
        ({"queries": 2**28}, "queries \\* heads"),
        ({"heads": 2**20, "channels": 2**10, "queries": 1}, "a token of more than 2\\^31"),
        ({"levels": 16, "points": 2**20}, "levels \\* points"),
    ),
)
def test_what_32_bits_cannot_count_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**change)


def test_large_batches_take_several_launches():
    """The limit here is two images per launch; a grid's is 65535."""
    run("cuda on host", make_case([(2, 3)], 5, 3, 2, 4, 1))
    assert cuda_on_host.library().host_launches() == 3


def test_guards_catch_a_stray_write():
    guarded = cuda_on_host.Guarded(torch.zeros(3))
    guarded.check()
    guarded.buffer[guarded.end] = 0
    with pytest.raises(AssertionError, match="beside its tensor"):
        guarded.check()
