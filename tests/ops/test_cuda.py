"""The op on a GPU. Without one, all tests skip. Under a sanitizer:

compute-sanitizer --tool memcheck python -m pytest tests/ops/test_cuda.py -k "layout or dtype"
compute-sanitizer --tool racecheck ..., --tool synccheck ..., --tool initcheck ...
"""

import pytest
import torch
from op_cases import Case, away_from_knots, make_case, relative_error, run

from eco_m2f.ops import MSDeformAttn, compiled_backends, ms_deform_attn, ms_deform_attn_fused
from eco_m2f.ops.ms_deform_attn import FORWARD

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif("cuda" not in compiled_backends(), reason="needs the CUDA kernels: ECO_M2F_BUILD=cuda"),
]
ENCODER = [(8, 16), (16, 32), (32, 64)]
PRECISION = {torch.float64: (1e-14, 1e-12), torch.float32: (1e-6, 5e-6), torch.float16: (5e-4, 1e-3)}
PRECISION[torch.bfloat16] = (4e-3, 5e-3)


def run_cuda(case: Case, layout=lambda tensor: tensor):
    leaves = [layout(t.cuda()).detach().requires_grad_() for t in case.leaves]
    out = ms_deform_attn(leaves[0], case.shapes, *leaves[1:])
    grads = torch.autograd.grad(out, leaves, layout(case.grad.cuda()))
    return out.detach().cpu(), tuple(grad.cpu() for grad in grads)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("heads, channels", ((8, 32), (8, 64), (4, 16), (2, 48), (3, 7), (1, 200)))
def test_values_and_gradients_of_each_dtype(dtype, heads, channels):
    exact = away_from_knots(make_case(ENCODER, 2, 301, heads, channels))
    exact = exact.with_(locations=exact.locations.float().double())
    expected, expected_grads = run("reference", exact)
    out, grads = run_cuda(exact.to(dtype))
    assert out.dtype == dtype and relative_error(out, expected) < PRECISION[dtype][0]
    for actual, wanted in zip(grads, expected_grads):
        assert relative_error(actual, wanted) < PRECISION[dtype][1]


@pytest.mark.parametrize("reference", ((2, 3), (1, 1)))
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("heads, channels, points", ((8, 32, 4), (4, 64, 4), (3, 7, 2), (2, 32, 40)))
def test_fused_values_and_gradients(dtype, heads, channels, points, reference):
    """Against the CPU in float64. 3 * 40 samples are too many for the fused kernels, and use the plain ones."""
    case = make_case(ENCODER, 2, 101, heads, channels, points)
    offsets, logits = 3 * torch.randn_like(case.locations), torch.randn_like(case.weights)
    places = torch.rand(reference[0], 101, reference[1], 2, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [case.value, *(t.to(wide).double() for t in (offsets, logits, places))]
    results = []
    for device, value_type, other_type in (("cpu", torch.float64, torch.float64), ("cuda", dtype, wide)):
        leaves = [t.to(device, value_type if i == 0 else other_type).requires_grad_() for i, t in enumerate(inputs)]
        out = ms_deform_attn_fused(leaves[0], ENCODER, *leaves[1:])
        results.append((out, *torch.autograd.grad(out, leaves, case.grad.to(device, value_type))))
    for i, (expected, actual) in enumerate(zip(*results)):
        assert relative_error(actual.detach().cpu(), expected.detach()) < 3 * PRECISION[dtype][i > 0]


@pytest.mark.parametrize("layout", ("transposed", "misaligned"))
def test_memory_layout_does_not_matter(layout):
    def change(tensor):
        if layout == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    case = make_case(ENCODER, 2, 77, dtype=torch.float32)
    expected, expected_grads = run_cuda(case)
    out, grads = run_cuda(case, change)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ("locations", "weights", "value", "grad"))
def test_what_is_not_finite_spreads_as_on_the_cpu(what):
    case = make_case(queries=20, dtype=torch.float32)
    {
        "locations": case.locations[1, 7, 3, 1, 2, 0:1],
        "weights": case.weights[1, 7, 3, 1, 2:3],
        "value": case.value[1, 100, 3, 5:6],
        "grad": case.grad[1, 7, 100:101],
    }[what].fill_(torch.nan)
    (expected, expected_grads), (out, grads) = run("reference", case), run_cuda(case)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        assert torch.equal(actual.isfinite(), wanted.isfinite())


def test_empty_inputs():
    for sizes in ({"batch": 0}, {"queries": 0}, {"points": 0}):
        case = make_case(**({"batch": 2, "queries": 5, "points": 2} | sizes), dtype=torch.float32)
        out, grads = run_cuda(case)
        assert out.shape == case.grad.shape and not out.any() and not any(grad.any() for grad in grads)


def test_more_images_than_a_grid_holds():
    case = make_case([(1, 2)], 65_537, 1, 1, 4, 1, torch.float32)
    (expected, expected_grads), (out, grads) = run("reference", case), run_cuda(case)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(actual, wanted)


def test_opcheck():
    case = make_case([(3, 4), (2, 5)], 2, 6, 2, 4, 2, torch.float32)
    leaves = [t.cuda().requires_grad_() for t in case.leaves]
    torch.library.opcheck(FORWARD, (leaves[0], case.flat_shapes, *leaves[1:]))


def test_no_synchronisation():
    case = make_case(ENCODER, 1, 100, dtype=torch.float32)
    value, locations, weights = (t.cuda().requires_grad_() for t in case.leaves)
    grad = case.grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ms_deform_attn(value, case.shapes, locations, weights).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_the_module():
    """Captured once, replayed with other inputs."""
    torch.manual_seed(0)
    attention = MSDeformAttn().cuda()
    tokens = sum(h * w for h, w in ENCODER)
    query, reference = torch.randn(1, tokens, 256, device="cuda"), torch.rand(1, tokens, 1, 2, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attention(query, reference, query, ENCODER)  # warms up the libraries
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(query, reference, query, ENCODER)
        query.copy_(torch.randn_like(query))
        graph.replay()
        torch.testing.assert_close(out, attention(query, reference, query, ENCODER))


def test_the_current_stream_is_used():
    case = make_case(ENCODER, 1, 200, dtype=torch.float32)
    value, locations, weights = (t.cuda() for t in case.leaves)
    expected = ms_deform_attn(value, case.shapes, locations, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = value * 2
        out = ms_deform_attn(late, case.shapes, locations, weights)
    stream.synchronize()
    torch.testing.assert_close(out, 2 * expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_arguments_is_used():
    case = make_case(ENCODER, 1, 50, dtype=torch.float32)
    out = ms_deform_attn(*(a.to("cuda:1") if torch.is_tensor(a) else a for a in list(vars(case).values())[:4]))
    assert out.device.index == 1
    torch.testing.assert_close(out.cpu(), run("reference", case)[0])


def test_deterministic_mode_names_the_op():
    case = make_case([(3, 4)], 1, 5, 2, 8, 2, torch.float32)
    value, locations, weights = (t.cuda().requires_grad_() for t in case.leaves)
    out = ms_deform_attn(value, case.shapes, locations, weights)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="ms_deform_attn_backward"):
            out.backward(case.grad.cuda())
    finally:
        torch.use_deterministic_algorithms(False)


def test_devices_must_not_mix():
    case = make_case([(3, 4)], 1, 5, 2, 8, 2, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        ms_deform_attn(case.value.cuda(), case.shapes, case.locations, case.weights)
