"""The fused op equals softmax, locations and op one after another, also in the gradients."""

import cuda_on_host
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from op_cases import COMPILED, make_case, relative_error, use
from torch.utils.flop_counter import FlopCounterMode

from eco_m2f.ops import FUSED_NAME, ms_deform_attn_flop_jit, ms_deform_attn_fused, reference_ms_deform_attn
from eco_m2f.ops.fused import FUSED, FUSED_BACKWARD, _composed_backward, _composed_forward

SHAPES = [(3, 4), (6, 8), (12, 16)]
backends = pytest.mark.parametrize("backend", (*COMPILED, "cuda on host"))


def make_inputs(
    shapes=SHAPES, batch=2, queries=21, heads=8, channels=32, points=4, dtype=torch.float64, reference=(2, 3)
):
    """(value, offsets in pixels, logits, reference points, gradient); reference: the points' batch and levels."""
    case = make_case(shapes, batch, queries, heads, channels, points)
    generator = torch.Generator().manual_seed(1)
    offsets = 3 * torch.randn(case.locations.shape, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(case.weights.shape, generator=generator, dtype=torch.float64)
    points = torch.rand(reference[0], queries, reference[1], 2, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return case.value.to(dtype), offsets.to(wide), logits.to(wide), points.to(wide), case.grad.to(dtype)


def run(backend, shapes, value, offsets, logits, points, grad):
    """-> output, gradients of value, offsets and logits, and of the points if autograd gives them."""
    if backend == "cuda on host":
        flat = [size for shape in shapes for size in shape]
        return cuda_on_host.run(value.detach(), flat, offsets.detach(), logits.detach(), grad, points.detach())
    leaves = [t.detach().requires_grad_() for t in (value, offsets, logits, points)]
    with use(backend):
        out = ms_deform_attn_fused(leaves[0], shapes, *leaves[1:])
        return out.detach(), torch.autograd.grad(out, leaves, grad)


def by_parts(value, shapes, offsets, logits, points):
    """The definition in PyTorch operators, with autograd."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)[:, None]
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    flat = [size for shape in shapes for size in shape]
    return reference_ms_deform_attn(value, flat, points[:, :, None, :, None] + offsets / sizes, weights)


@pytest.mark.parametrize("reference", ((2, 3), (1, 3), (2, 1), (1, 1)))
@backends
def test_values_and_gradients(backend, reference):
    *inputs, grad = make_inputs(reference=reference)
    leaves = [t.requires_grad_() for t in inputs]
    out, grads = run(backend, SHAPES, *leaves, grad)
    expected = by_parts(leaves[0], SHAPES, *leaves[1:])
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(actual, wanted)


def test_without_the_fused_kernels():
    """The form for other devices, and without compiled kernels."""
    *inputs, grad = make_inputs()
    flat = [size for shape in SHAPES for size in shape]
    leaves = [t.requires_grad_() for t in inputs]
    expected = by_parts(leaves[0], SHAPES, *leaves[1:])
    with torch.no_grad():
        torch.testing.assert_close(_composed_forward(leaves[0], flat, *leaves[1:]), expected)
        grads = _composed_backward(grad, leaves[0], flat, *leaves[1:])
    for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves[:3], grad)):
        torch.testing.assert_close(actual, wanted)


@backends
def test_gradients_in_half_precision(backend):
    *inputs, grad = make_inputs(reference=(1, 1))
    exact = [inputs[0], *(t.float().double() for t in inputs[1:])]
    leaves = [t.requires_grad_() for t in exact]
    wanted = torch.autograd.grad(by_parts(leaves[0], SHAPES, *leaves[1:]), leaves, grad)
    half = [exact[0].detach().bfloat16(), *(t.detach().float() for t in exact[1:])]
    _, grads = run(backend, SHAPES, *half, grad.bfloat16())
    for actual, expected, leaf in zip(grads, wanted, half):
        assert actual.dtype == leaf.dtype and relative_error(actual, expected) < 1e-2


@pytest.mark.parametrize("levels, points, channels", ((1, 1, 4), (1, 7, 33), (2, 4, 130), (4, 4, 16), (5, 7, 64)))
@backends
def test_other_sizes(backend, levels, points, channels):
    shapes = [(2 + i, 7 - i) for i in range(levels)]
    for count in (1, levels):
        *inputs, grad = make_inputs(shapes, 2, 9, 3, channels, points, torch.float32, (1, count))
        out, grads = run(backend, shapes, *inputs, grad)
        exact = [t.double().requires_grad_() for t in inputs]
        expected = by_parts(exact[0], shapes, *exact[1:])
        assert relative_error(out, expected) < 3e-6
        for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double())):
            assert (actual.double() - wanted).norm() < 2e-5 * (1 + wanted.norm())


BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@backends
def test_precision_of_each_dtype(backend, dtype):
    exact = make_inputs(reference=(1, 1))[:4]
    exact = [exact[0], *(t.float().double() for t in exact[1:])]
    wide = torch.promote_types(dtype, torch.float32)
    rounded = [exact[0].to(dtype), *(t.to(wide) for t in exact[1:])]
    out, _ = run(backend, SHAPES, *rounded, make_inputs(dtype=dtype)[4])
    assert out.dtype == dtype
    assert relative_error(out, by_parts(exact[0], SHAPES, *exact[1:])) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("backend", COMPILED)
def test_strided_inputs(backend):
    value, offsets, logits, points, _ = make_inputs(dtype=torch.float32)
    with use(backend):
        expected = ms_deform_attn_fused(value, SHAPES, offsets, logits, points)
        strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (value, offsets, logits, points)]
        assert torch.equal(ms_deform_attn_fused(strided[0], SHAPES, *strided[1:]), expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@backends
def test_softmax_of_extreme_logits(backend, dtype):
    """Logits that are far apart, large, small, or minus infinity, as in PyTorch's softmax."""
    value, offsets, logits, points, grad = make_inputs(dtype=dtype)
    logits[:, 0] *= 100
    logits[:, 1] += 1e4
    logits[:, 2] -= 1e4
    logits[:, 3, :, 0] = -torch.inf
    logits[:, 4] = torch.linspace(-120, 0, 12, dtype=dtype).view(3, 4)
    out, _ = run(backend, SHAPES, value, offsets, logits, points, grad)
    torch.testing.assert_close(out, by_parts(value, SHAPES, offsets, logits, points))


@backends
def test_gradients_that_are_not_finite_stay_with_their_head(backend):
    *inputs, grad = make_inputs(dtype=torch.float32, reference=(1, 1))
    inputs[1][1, 7, 3, 2, 1, 0] = torch.nan
    grad[0, 5, 2 * 32 + 1] = torch.inf
    _, grads = run(backend, SHAPES, *inputs, grad)
    hit = torch.zeros(2, 21, 8, dtype=torch.bool)
    hit[1, 7, 3] = hit[0, 5, 2] = True
    assert torch.equal(~grads[2].isfinite().flatten(3).any(-1), hit)  # the softmax shares it among the samples
    assert torch.equal(~grads[1].isfinite().flatten(3).all(-1), hit)
    assert grads[0][1].isfinite().all() and grads[0][0, :, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("what", ("offset", "logit", "infinite logit", "no finite logit", "reference"))
@backends
def test_what_is_not_finite_is_not_hidden(backend, what):
    value, offsets, logits, points, grad = make_inputs(dtype=torch.float32)
    hit = torch.zeros(2, 21, 8, dtype=torch.bool)
    hit[1, 7, 3] = True
    if what == "offset":
        offsets[1, 7, 3, 2, 1, 0] = torch.nan
    elif what == "reference":
        points[1, 7, 2, 1] = torch.inf
        hit[1, 7] = True
    else:
        bad = {"logit": torch.nan, "infinite logit": torch.inf, "no finite logit": -torch.inf}[what]
        logits[1, 7, 3, *([] if what == "no finite logit" else [2, 1])] = bad
    out, _ = run(backend, SHAPES, value, offsets, logits, points, grad)
    assert torch.equal(out.view(2, 21, 8, 32).isnan().all(-1), hit)
    assert torch.equal(out.view(2, 21, 8, 32).isfinite().all(-1), ~hit)


@pytest.mark.parametrize("empty", ("batch", "queries", "heads", "channels", "points"))
def test_empty_dimensions(empty):
    sizes = {"batch": 2, "queries": 5, "heads": 3, "channels": 8, "points": 2} | {empty: 0}
    *inputs, grad = make_inputs(**sizes, reference=(1, 1))
    leaves = [t.requires_grad_() for t in inputs]
    out = ms_deform_attn_fused(leaves[0], SHAPES, *leaves[1:])
    assert out.shape == grad.shape and not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out, leaves, grad))


def small(dtype=torch.float64, **sizes):
    sizes = {"batch": 2, "queries": 5, "heads": 2, "channels": 4, "points": 2} | sizes
    return make_inputs([(3, 4), (2, 5)], **sizes, dtype=dtype, reference=(1, 2))[:4]


def test_gradcheck():
    leaves = [t.requires_grad_() for t in small(queries=3, heads=1, channels=2)]
    assert torch.autograd.gradcheck(lambda *t: ms_deform_attn_fused(t[0], [(3, 4), (2, 5)], *t[1:]), leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype):
    value, *rest = (t.requires_grad_() for t in small(dtype))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(FUSED, (value, [3, 4, 2, 5], *rest), test_utils=checks)


def test_opcheck_backward():
    value, *rest = small(torch.float32)
    grad = torch.ones(2, 5, 8)
    torch.library.opcheck(FUSED_BACKWARD, (grad, value, [3, 4, 2, 5], *rest))


def test_second_derivative_is_refused():
    leaves = [t.requires_grad_() for t in small()]
    out = ms_deform_attn_fused(leaves[0], [(3, 4), (2, 5)], *leaves[1:])
    first = torch.autograd.grad(out, leaves, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first[0].sum().backward()


def test_compile_in_one_graph():
    torch._dynamo.reset()

    def attend(value, *rest):
        return ms_deform_attn_fused(value, [(3, 4), (2, 5)], *rest)

    leaves = [t.requires_grad_() for t in small(torch.float32)]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*leaves), by_parts(leaves[0], [(3, 4), (2, 5)], *leaves[1:])
    torch.testing.assert_close(out, expected)
    ones = torch.ones_like(out)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, ones), torch.autograd.grad(expected, leaves, ones)):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_all_but_the_value_exact():
    value, *rest = small(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ms_deform_attn_fused(value.bfloat16(), [(3, 4), (2, 5)], *(t.double() for t in rest))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ms_deform_attn_fused(value.bfloat16(), [(3, 4), (2, 5)], *rest))


def test_flops_are_those_of_the_plain_op():
    value, *rest = small(torch.float32)
    multiply_adds = 4 * 2 * 5 * 2 * 2 * 2 * 4  # corners N Lq M L P D
    with FlopCounterMode(display=False) as counter:
        ms_deform_attn_fused(value, [(3, 4), (2, 5)], *rest)
    assert counter.get_total_flops() == 2 * multiply_adds

    class Attend(torch.nn.Module):
        def forward(self, value, offsets, logits, points):
            return ms_deform_attn_fused(value, [(3, 4), (2, 5)], offsets, logits, points)

    analysis = FlopCountAnalysis(Attend(), (value, *rest)).set_op_handle(FUSED_NAME, ms_deform_attn_flop_jit)
    assert analysis.total() == multiply_adds


ERRORS = (
    (ValueError, "reference_points", lambda v, o, w, r: (v, o, w, r[:, :3])),
    (ValueError, "reference_points", lambda v, o, w, r: (v, o, w, r.expand(3, -1, -1, -1))),
    (ValueError, "spatial_shapes|must be", lambda v, o, w, r: (v, o[:, :, :, :1], w[:, :, :, :1], r[:, :, :1])),
    (ValueError, "attention_logits|attention_weights", lambda v, o, w, r: (v, o, w[..., :1], r)),
    (TypeError, "must be .*loat", lambda v, o, w, r: (v, o.half(), w, r)),
    (TypeError, "must be .*loat", lambda v, o, w, r: (v, o, w.double(), r)),
    (TypeError, "must be .*loat", lambda v, o, w, r: (v, o, w, r.half())),
)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("kind, message, change", ERRORS)
def test_errors_name_what_does_not_fit(kind, message, change, device):
    value, *rest = (t.to(device) for t in change(*small(torch.float32)))
    with pytest.raises(kind, match=message):
        ms_deform_attn_fused(value, [(3, 4), (2, 5)], *rest)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("shapes", ([(2**32, 2**32), (2, 11)], [(3, 4 + 2**62), (2, 5)], [(-3, -4), (2, 5)]), ids=str)
def test_sizes_that_wrap_round_to_the_number_of_tokens_are_refused(shapes, device):
    value, *rest = (t.to(device) for t in small(torch.float32))
    grad = value.new_zeros(value.shape[0], rest[0].shape[1], value.shape[2] * value.shape[3])
    flat = [size for pair in shapes for size in pair]
    for call in (lambda: FUSED(value, flat, *rest), lambda: FUSED_BACKWARD(grad, value, flat, *rest)):
        with pytest.raises(ValueError, match="positive|22 tokens, but spatial_shapes"):
            call()


def test_the_backward_checks_the_gradient_that_it_gets():
    value, *rest = small(torch.float32)
    grad = value.new_zeros(value.shape[0], rest[0].shape[1], value.shape[2] * value.shape[3])
    for wrong in (grad[:, 1:], grad.double(), grad.to("meta")):
        for backward in (FUSED_BACKWARD, _composed_backward):
            with pytest.raises((ValueError, TypeError), match="grad_output|on one device"):
                backward(wrong, value, [3, 4, 2, 5], *rest)
