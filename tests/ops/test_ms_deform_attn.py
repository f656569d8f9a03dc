"""The op on all CPU backends: values, gradients, precision, input layouts, borders, and values that are not finite."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BACKENDS,
    COMPILED,
    PYRAMID,
    Case,
    away_from_knots,
    cpu_sampler,
    make_case,
    relative_error,
    run,
    use,
)
from safetensors.torch import load_file

from eco_m2f.ops import compiled_backends, grid_sample_ms_deform_attn, ms_deform_attn, reference_ms_deform_attn

backends = pytest.mark.parametrize("backend", BACKENDS)


def recorded(path) -> list[Case]:
    """The recorded cases of a file, with the expected output and gradients as attributes."""
    data, cases = load_file(path), []
    for i in range(len({name.split(".")[0] for name in data})):
        part = {name.split(".")[1]: t for name, t in data.items() if name.startswith(f"case{i}.")}
        shapes = [tuple(shape) for shape in part["shapes"].tolist()]
        case = Case(part["value"], shapes, part["loc"], part["weight"], part["grad_out"])
        case.expected = [part[name] for name in ("out", "grad_value", "grad_loc", "grad_weight")]
        cases.append(case)
    return cases


def assert_matches(backend: str, case: Case) -> None:
    out, grads = run(backend, case)
    for actual, expected in zip((out, *grads), case.expected):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@backends
def test_recorded_values_and_gradients(backend, assets):
    cases = recorded(assets / "msda.safetensors")
    assert len(cases) == 3
    for case in cases:
        assert_matches(backend, case)


@backends
def test_values_and_gradients_of_the_original_implementation(backend, shared):
    cases = recorded(shared / "oracle" / "msda.safetensors")
    assert len(cases) == 4
    for case in cases:
        assert_matches(backend, case)


@pytest.mark.parametrize("channels", (1, 3, 8, 16, 32, 33, 64, 80, 128, 130))
@backends
def test_every_number_of_channels(backend, channels):
    case = make_case([(5, 7), (2, 3)], 2, 9, 3, channels, 3)
    (out, grads), (expected, expected_grads) = run(backend, case), run("reference", case)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("levels, points", ((1, 1), (1, 8), (2, 5), (3, 4), (4, 4), (5, 7)))
@backends
def test_every_number_of_samples(backend, levels, points):
    shapes = [(2 + i, 7 - i) for i in range(levels)]
    case = make_case(shapes, 1, 11, 2, 16, points, torch.float32)
    (out, grads), (expected, expected_grads) = run(backend, case), run("reference", case.to(torch.float64))
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        assert relative_error(actual, wanted) < 2e-6


@backends
def test_reference_and_kernels_equal_grid_sample(backend):
    case = make_case()
    expected = grid_sample_ms_deform_attn(case.value, case.flat_shapes, case.locations, case.weights)
    torch.testing.assert_close(run(backend, case)[0], expected)


@pytest.mark.parametrize("backend", ("reference", "avx512", "portable"))
def test_gradcheck(backend):
    case = away_from_knots(make_case([(3, 2), (4, 5)], 2, 4, 2, 3, 2), 1e-2)
    leaves = [t.requires_grad_() for t in case.leaves]
    with use(backend):
        function = ms_deform_attn if backend != "reference" else reference_ms_deform_attn
        assert torch.autograd.gradcheck(lambda *t: function(t[0], case.flat_shapes, *t[1:]), leaves)


PRECISION = {torch.float64: (1e-14, 1e-13), torch.float32: (1e-6, 5e-6), torch.float16: (5e-4, 1e-3)}
PRECISION[torch.bfloat16] = (4e-3, 5e-3)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@backends
def test_precision_of_each_dtype(backend, dtype):
    """Against float64 with unrounded inputs. The locations are exact in float32."""
    exact = away_from_knots(make_case([(8, 16), (16, 32), (32, 64)], 1, 230))
    exact = exact.with_(locations=exact.locations.float().double())
    expected, expected_grads = run("reference", exact)
    out, grads = run(backend, exact.to(dtype))
    assert out.dtype == dtype and [g.dtype for g in grads] == [dtype, exact.to(dtype).locations.dtype, dtype]
    forward_bound, backward_bound = PRECISION[dtype]
    assert relative_error(out, expected) < forward_bound
    for actual, wanted in zip(grads, expected_grads):
        assert relative_error(actual, wanted) < backward_bound


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other":
        return torch.stack((tensor, torch.full_like(tensor, math.nan)), dim=-1)[..., 0]
    return torch.cat((tensor.new_full((3,), math.nan), tensor.flatten()))[3:].view(tensor.shape)  # misaligned


@pytest.mark.parametrize("layout", ("transposed", "every other", "misaligned"))
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@backends
def test_memory_layout_does_not_matter(backend, dtype, layout):
    case = make_case(queries=11, dtype=dtype)
    other = Case(*(t if isinstance(t, list) else strided(t, layout) for t in vars(case).values()))
    with use(backend):
        expected, expected_grads = run(backend, case)
        out, grads = run(backend, other)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        if backend == "cuda on host" and layout == "misaligned":  # other kernels, which sum in another order
            torch.testing.assert_close(actual, wanted)
        else:
            assert torch.equal(actual, wanted)


@backends
def test_expanded_gradient(backend):
    case = make_case(queries=7)
    ones = torch.ones((), dtype=torch.float64).expand(case.grad.shape)
    for actual, wanted in zip(run(backend, case.with_(grad=ones))[1], run(backend, case.with_(grad=ones.clone()))[1]):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("empty", ("batch", "queries", "heads", "channels", "points"))
@backends
def test_empty_dimensions(backend, empty):
    sizes = {"batch": 2, "queries": 5, "heads": 3, "channels": 8, "points": 2} | {empty: 0}
    case = make_case([(2, 3), (4, 5)], **sizes)
    out, grads = run(backend, case)
    assert out.shape == (sizes["batch"], sizes["queries"], sizes["heads"] * sizes["channels"])
    assert not out.any()
    for grad, leaf in zip(grads, case.leaves):
        assert grad.shape == leaf.shape and not grad.any()


@backends
def test_no_levels(backend):
    case = make_case([], 2, 5, 3, 8, 2)
    out, grads = run(backend, case)
    assert out.shape == (2, 5, 24) and not out.any() and grads[0].shape == (2, 0, 3, 8)


@backends
def test_images_and_heads_do_not_mix(backend):
    """A batch equals its images one by one, for odd and even counts."""
    case = make_case([(5, 3), (2, 7)], 3, 13, 5, 8, 3)
    out, grads = run(backend, case)
    for i in range(3):
        parts = [t[i : i + 1] for t in (case.value, case.locations, case.weights, case.grad)]
        single, single_grads = run(backend, Case(parts[0], case.shapes, *parts[1:]))
        torch.testing.assert_close(out[i : i + 1], single)
        for actual, wanted in zip(grads, single_grads):
            torch.testing.assert_close(actual[i : i + 1], wanted)


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_do_not_matter(backend):
    case = make_case(queries=200, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run(backend, case)
        torch.set_num_threads(3)
        several = run(backend, case)
    finally:
        torch.set_num_threads(before)
    for actual, wanted in zip((several[0], *several[1]), (single[0], *single[1])):
        assert relative_error(actual, wanted) < 1e-6


def point_case(locations, shape=(4, 6), dtype=torch.float64, channels=8) -> Case:
    """One level, one head, one point per query."""
    locations = torch.tensor(locations, dtype=torch.float64).view(1, -1, 1, 1, 1, 2)
    case = make_case([shape], 1, locations.shape[1], 1, channels, 1)
    return case.with_(locations=locations, weights=torch.ones_like(case.weights)).to(dtype)


def at_pixels(pixels, shape=(4, 6), **kwargs) -> Case:
    """Points at these (column, row). The division by the size must be exact."""
    return point_case([((x + 0.5) / shape[1], (y + 0.5) / shape[0]) for x, y in pixels], shape, **kwargs)


@backends
def test_exact_integer_coordinates_take_the_slope_from_above(backend):
    """At a cell's centre the value is the cell's. The derivative is the difference to the next cell, right or below."""
    case = at_pixels([(1, 1), (3, 2), (7, 3), (-1, 0), (3, 3), (0, -1)], (4, 8))
    out, (grad_value, grad_locations, grad_weights) = run(backend, case)
    maps = F.pad(case.value[0, :, 0].view(4, 8, 8), (0, 0, 1, 1, 1, 1))  # zeros around it; [row + 1, column + 1]
    for i, (x, y) in enumerate([(1, 1), (3, 2), (7, 3), (-1, 0), (3, 3), (0, -1)]):
        here, right, below = maps[y + 1, x + 1], maps[y + 1, x + 2], maps[y + 2, x + 1]
        grad = case.grad[0, i]
        torch.testing.assert_close(out[0, i], here)
        torch.testing.assert_close(grad_weights[0, i].sum(), here @ grad)
        slope = torch.stack(((right - here) @ grad * 8, (below - here) @ grad * 4))
        torch.testing.assert_close(grad_locations[0, i].flatten(), slope)


@backends
def test_border_points_see_zeros_beyond_the_map(backend):
    """Points between the last cell and the outside. The border value is large and would show a clamped corner."""
    case = at_pixels([(-0.5, 1.0), (5.5, 1.0), (2.0, -0.5), (2.0, 3.5), (5.75, 3.75), (-0.75, -0.25)])
    case = case.with_(value=case.value + 100)
    expected, expected_grads = run("reference", case)
    grid = grid_sample_ms_deform_attn(case.value, case.flat_shapes, case.locations, case.weights)
    torch.testing.assert_close(expected, grid)
    out, grads = run(backend, case)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(actual, wanted)
    maps = F.pad(case.value[0, :, 0].view(4, 6, 8), (0, 0, 1, 1, 1, 1))
    slope = (maps[2, 1] - maps[2, 0]) @ case.grad[0, 0] * 6  # the first point: half way from outside to (0, 1)
    torch.testing.assert_close(grads[1][0, 0].flatten()[0], slope)


FAR = [(-1.0, 0.5), (0.5, 2.0), (1e10, 0.5), (0.5, -1e10), (3e38, -3e38), (1e20, 1e20), (-1.001 / 6, 0.5)]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@backends
def test_points_far_outside_count_nothing(backend, dtype):
    """Also if the neighbour that a clamped index would read is NaN."""
    case = point_case(FAR, (2, 3), dtype)
    out, grads = run(backend, case.with_(value=torch.full_like(case.value, math.nan)))
    if dtype == torch.float32:  # 3e38 * 3 is infinite, and that is not a number on the map
        assert out[0, 4].isnan().all() and grads[1][0, 4].isnan().all()
        keep = torch.arange(len(FAR)) != 4
        out, grads = out[:, keep], (grads[0], grads[1][:, keep], grads[2][:, keep])
    for tensor in (out, *grads):
        assert not tensor.any()


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@backends
def test_location_that_is_not_finite(backend, dtype, bad):
    case = make_case(queries=11, dtype=dtype)
    case.locations[1, 7, 3, 1, 2, 0] = bad
    clean = make_case(queries=11, dtype=dtype)
    clean.weights[1, 7, 3, 1, 2] = 0  # what must remain of grad_value
    (out, grads), (_, clean_grads) = run(backend, case), run(backend, clean)
    hit = torch.zeros(2, 11, 8, dtype=torch.bool)
    hit[1, 7, 3] = True
    assert torch.equal(out.view(2, 11, 8, 32).isnan(), hit[..., None].expand(-1, -1, -1, 32))
    bad_points = torch.zeros_like(case.weights, dtype=torch.bool)
    bad_points[1, 7, 3, 1, 2] = True
    assert torch.equal(grads[2].isnan(), bad_points)
    assert torch.equal(grads[1].isnan(), bad_points[..., None].expand_as(grads[1]))
    torch.testing.assert_close(grads[0], clean_grads[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("place", (0.5, -7.0))
@backends
def test_attention_weight_that_is_not_finite(backend, bad, place):
    case = make_case(queries=11, dtype=torch.float32)
    case.weights[1, 7, 3, 1, 2] = bad
    case.locations[1, 7, 3, 1, 2] = place
    out, grads = run(backend, case)
    hit = torch.zeros(2, 11, 8, dtype=torch.bool)
    hit[1, 7, 3] = True
    assert torch.equal(out.view(2, 11, 8, 32).isfinite().all(-1), ~hit)
    assert grads[2].isfinite().all()
    bad_points = torch.zeros_like(case.weights, dtype=torch.bool)
    bad_points[1, 7, 3, 1, 2] = True
    assert torch.equal(~grads[1].isfinite().any(-1), bad_points)
    bad_cells = ~grads[0].isfinite().all(-1)
    assert bad_cells.sum() == (4 if place == 0.5 else 0) and not bad_cells[0].any()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@backends
def test_cell_that_is_not_finite(backend, bad):
    """It reaches only the points that touch it, also with a bilinear weight of zero."""
    pixels = [(2, 1), (1, 1), (1.5, 0.5), (3, 1), (2, 2), (0.5, 0.5), (2, 0), (-8, 1), (2, -1), (2, 40)]
    touches = [True, True, True, False, False, False, True, False, False, False]
    case = at_pixels(pixels, (4, 8), dtype=torch.float32)
    case.value[0, 1 * 8 + 2] = bad
    out, grads = run(backend, case)
    assert [not finite for finite in out[0].isfinite().all(-1)] == touches
    assert grads[0].isfinite().all()
    assert [not finite for finite in grads[2].flatten().isfinite()] == touches
    assert [not finite for finite in grads[1].view(-1, 2).isfinite().any(-1)] == touches


@pytest.mark.parametrize("cell", (0, 5, 18, 23))
@backends
def test_corner_cell_that_is_not_finite(backend, cell):
    """These are the cells that clamped indices would read for points outside the map."""
    pixels = [(-2, -2), (-2, 1.5), (7, 5), (2.5, 9), (2.5, 1.5)]
    case = at_pixels(pixels)
    case.value[0, cell] = math.nan
    out, grads = run(backend, case)
    for tensor in (out, *grads):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@backends
def test_gradient_that_is_not_finite(backend, bad):
    case = make_case(queries=11, dtype=torch.float32)
    case.grad[1, 7, 3 * 32 + 5] = bad
    case.locations[1, 7, 3, 0, 0] = -9.0
    _, grads = run(backend, case)
    hit = torch.zeros(2, 11, 8, dtype=torch.bool)
    hit[1, 7, 3] = True
    assert torch.equal(grads[2].isfinite().any((-2, -1)), ~hit) and torch.equal(
        ~grads[2].isfinite().all(-1).all(-1), hit
    )
    assert torch.equal(~grads[1].isfinite().flatten(3).all(-1), hit)
    bad_cells = ~grads[0].isfinite().all(-1)
    assert bad_cells[1, :, 3].any() and bad_cells.sum() == bad_cells[1, :, 3].sum() <= 44  # 11 points, 4 cells each


@pytest.mark.parametrize("width", (3, 5, 7, 11, 13, 100, 167, 1333))
@backends
def test_points_next_to_a_knot_fall_into_the_same_cell(backend, width):
    """Around each cell centre a fused multiply-add would differ from a product and a difference."""
    knots = (torch.arange(-1, width + 1, dtype=torch.float32) + 0.5) / width
    near = torch.cat([knots, torch.nextafter(knots, knots + 1), torch.nextafter(knots, knots - 1)])
    case = make_case([(1, width)], 1, len(near), 1, 4, 1, torch.float32)
    case.locations[..., 0], case.locations[..., 1] = near.view(1, -1, 1, 1, 1), 0.5
    case.weights.fill_(1)
    pixel = case.locations[..., 0] * width - 0.5  # two float32 roundings
    cell = pixel.floor().long().flatten()
    row = F.pad(case.value[0, :, 0], (0, 0, 1, 2))
    inside = (cell >= -1) & (cell < width)
    cell = cell.clamp(-1, width - 1)
    slope = ((row[cell + 2] - row[cell + 1]) * case.grad[0]).sum(-1) * width * inside
    _, grads = run(backend, case)
    torch.testing.assert_close(grads[1][..., 0].flatten(), slope, rtol=1e-4, atol=1e-3)


@backends
def test_one_cell_maps(backend):
    case = make_case([(1, 1), (1, 4), (3, 1)], 2, 30, 2, 8, 2, margin=1.0)
    expected = grid_sample_ms_deform_attn(case.value, case.flat_shapes, case.locations, case.weights)
    torch.testing.assert_close(run(backend, case)[0], expected)


@backends
def test_all_queries_on_one_cell(backend):
    """All gradients add up in one row."""
    case = make_case([(4, 4)], 1, 500, 2, 8, 4, torch.float32)
    case.locations.fill_(0.375)  # the centre of cell (1, 1)
    _, grads = run(backend, case)
    total = case.grad.double().view(500, 2, 8)
    total = (total * case.weights.double().sum((-2, -1))[0, :, :, None]).sum(0)
    torch.testing.assert_close(grads[0][0, 5].double(), total, rtol=1e-4, atol=1e-4)
    assert not grads[0][0, torch.arange(16) != 5].any()


def test_few_queries_on_a_large_map():
    """In a decoder's call, staging the maps does not pay."""
    case = make_case([(40, 60), (20, 30)], 1, 9, 4, 32, 4, torch.float32)
    with use("avx512") if "cpu" in compiled_backends() else use("reference"):
        out = ms_deform_attn(case.value, case.shapes, case.locations, case.weights)
    assert relative_error(out, run("reference", case.to(torch.float64))[0]) < 5e-6


@pytest.mark.parametrize("limit", COMPILED)
def test_samplers_are_told_apart(limit):
    """A forced instruction set must change the kernel: another order of sums differs in the last bits."""
    with use(limit):
        with cpu_sampler(limit) as used:
            assert used == limit
    with pytest.raises(ValueError, match="sse9"), cpu_sampler("sse9"):
        pass


def test_pyramid_uses_the_staged_kernels():
    """The cases above have enough queries, and do not use the portable kernels."""
    for queries in (9, 11, 50):
        assert 4 * queries * len(PYRAMID) * 4 >= sum(h * w for h, w in PYRAMID)
