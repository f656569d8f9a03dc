"""The op's registrations with PyTorch: checks, fake kernels, autograd, compile, export, autocast, FLOPs, errors."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from op_cases import make_case, relative_error, run
from torch.utils.flop_counter import FlopCounterMode

from eco_m2f.ops import (
    OP_NAME,
    build_info,
    compiled_backends,
    grid_sample_ms_deform_attn,
    ms_deform_attn,
    ms_deform_attn_flop_jit,
)
from eco_m2f.ops.ms_deform_attn import BACKWARD, FORWARD, _reference_backward, _reference_forward

SHAPES = [(3, 4), (2, 5)]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Attend(torch.nn.Module):
    """The op as a module, with constant shapes."""

    def __init__(self, shapes=SHAPES, op=ms_deform_attn):
        super().__init__()
        self.shapes, self.op = shapes, op

    def forward(self, value, locations, weights):
        return self.op(value, self.shapes, locations, weights)


def small(dtype=torch.float32, **sizes):
    return make_case(
        SHAPES, **({"batch": 2, "queries": 6, "heads": 2, "channels": 4, "points": 2} | sizes), dtype=dtype
    )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_opcheck_forward(dtype):
    case = small(dtype)
    leaves = [t.requires_grad_() for t in case.leaves]
    torch.library.opcheck(FORWARD, (leaves[0], case.flat_shapes, *leaves[1:]), test_utils=CHECKS)


def test_opcheck_backward():
    case = small()
    torch.library.opcheck(BACKWARD, (case.grad, case.value, case.flat_shapes, case.locations, case.weights))


def test_opcheck_of_strided_inputs():
    case = small()
    value = case.value.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    torch.library.opcheck(FORWARD, (value, case.flat_shapes, case.locations, case.weights), test_utils=CHECKS)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_in_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, queries in ((2, 6), (3, 9), (1, 4)):
        case = small(batch=batch, queries=queries)
        leaves = [t.clone().requires_grad_() for t in case.leaves]
        expected, expected_grads = run("reference", case)
        out = compiled(*leaves)
        torch.testing.assert_close(out, expected)
        for actual, wanted in zip(torch.autograd.grad(out, leaves, case.grad), expected_grads):
            torch.testing.assert_close(actual, wanted)


def test_export_with_a_dynamic_batch():
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attend(), small().leaves, dynamic_shapes=[{0: batch}] * 3)
    assert "eco_m2f.ms_deform_attn" in str(program.graph)
    case = small(batch=5)
    torch.testing.assert_close(program.module()(*case.leaves), run("reference", case)[0])


def test_jit_trace():
    traced = torch.jit.trace(Attend(), small().leaves)
    case = small(batch=3)
    torch.testing.assert_close(traced(*case.leaves), run("reference", case)[0])


def test_onnx_export_of_the_grid_sample_form(tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnx = pytest.importorskip("onnx", reason="torch.onnx needs onnx")
    case = small()
    model = Attend(case.flat_shapes, grid_sample_ms_deform_attn).eval()
    torch.onnx.export(model, case.leaves, tmp_path / "op.onnx", dynamo=True)
    kinds = {node.op_type for node in onnx.load(tmp_path / "op.onnx").graph.node}
    assert "GridSample" in kinds
    session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(tmp_path / "op.onnx"))
    inputs = dict(zip(session.input_names, (leaf.detach().numpy() for leaf in case.leaves)))
    (out,) = session.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(out), model(*case.leaves).detach(), atol=1e-5, rtol=1e-5)


def test_grid_sample_form_exports_without_custom_operators():
    """Exporters to other runtimes need PyTorch's operators only."""
    case = small()
    program = torch.export.export(Attend(case.flat_shapes, grid_sample_ms_deform_attn), case.leaves)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("grid_sampler" in name for name in names) and not any("eco_m2f" in name for name in names)
    torch.testing.assert_close(program.module()(*case.leaves), run("reference", case)[0])


@pytest.mark.parametrize("form", (ms_deform_attn, grid_sample_ms_deform_attn))
def test_vmap_is_refused_or_right(form):
    """No batching rule is registered: PyTorch's own loop must give the right result."""
    case = small()
    shapes = case.flat_shapes
    out = torch.vmap(lambda v, x, w: form(v[None], shapes, x[None], w[None])[0])(*case.leaves)
    torch.testing.assert_close(out, run("reference", case)[0])


def test_second_derivative_is_refused():
    case = small()
    leaves = [t.requires_grad_() for t in case.leaves]
    out = ms_deform_attn(leaves[0], case.shapes, *leaves[1:])
    first = torch.autograd.grad(out, leaves, case.grad.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first[0].sum().backward()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_follows_the_value_and_keeps_locations_exact(dtype):
    case = small(channels=32)
    with torch.autocast("cpu", dtype):
        half = ms_deform_attn(case.value.to(dtype), case.shapes, case.locations, case.weights)
        full = ms_deform_attn(case.value, case.shapes, case.locations, case.weights.to(dtype))
        coarse = ms_deform_attn(case.value.to(dtype), case.shapes, case.locations.double(), case.weights)
    assert half.dtype == dtype and full.dtype == torch.float32 and coarse.dtype == dtype
    expected = run("reference", case)[0]
    assert relative_error(half, expected) < 1e-2 and relative_error(full, expected) < 1e-2
    assert torch.equal(half, coarse)


def test_autocast_gradients_reach_the_leaves():
    case = small()
    leaves = [t.requires_grad_() for t in case.leaves]
    with torch.autocast("cpu", torch.bfloat16):
        out = ms_deform_attn(leaves[0].bfloat16(), case.shapes, *leaves[1:])
    grads = torch.autograd.grad(out, leaves, case.grad.bfloat16())
    for actual, wanted in zip(grads, run("reference", case)[1]):
        assert actual.dtype == torch.float32 and relative_error(actual, wanted) < 2e-2


def test_flops_of_torch():
    case = small()
    leaves = [t.requires_grad_() for t in case.leaves]
    with FlopCounterMode(display=False) as forward:
        out = ms_deform_attn(leaves[0], case.shapes, *leaves[1:])
    per_corner = 2 * 6 * 2 * len(SHAPES) * 2 * 4 * 4  # N Lq M L P D, four corners
    assert forward.get_total_flops() == 2 * per_corner
    with FlopCounterMode(display=False) as backward:
        out.backward(case.grad)
    assert backward.get_total_flops() == 4 * per_corner


def test_flops_of_fvcore():
    case = small()
    paper = FlopCountAnalysis(Attend(), case.leaves).unsupported_ops_warnings(False)
    full = FlopCountAnalysis(Attend(), case.leaves).set_op_handle(OP_NAME, ms_deform_attn_flop_jit)
    grid = FlopCountAnalysis(Attend(case.flat_shapes, grid_sample_ms_deform_attn), case.leaves)
    multiply_adds = 2 * 6 * 2 * len(SHAPES) * 2 * 4 * 4
    assert paper.total() == 0 and full.total() == multiply_adds
    assert grid.unsupported_ops_warnings(False).by_operator()["grid_sampler"] == multiply_adds


def wrong(change):
    """A call (value, shapes, locations, weights) with one mistake."""
    case = small()
    arguments = {"value": case.value, "shapes": case.shapes, "locations": case.locations, "weights": case.weights}
    return (arguments | change(case)).values()


ERRORS = {
    "value.*\\[N,S,M,D\\]": lambda c: {"value": c.value[0]},
    "22 tokens, but spatial_shapes \\[3, 4, 2, 4\\] make 20": lambda c: {"shapes": [(3, 4), (2, 4)]},
    "2 levels, but spatial_shapes is \\[3, 4\\]": lambda c: {"shapes": [(3, 4)]},
    "must be attention_weights": lambda c: {"weights": c.weights[..., :1]},
    "batch size and heads differ": lambda c: {"value": c.value[:1]},
}
TYPE_ERRORS = {
    "attention_weights must have value's dtype": lambda c: {"weights": c.weights.double()},
    "sampling_locations must be": lambda c: {"locations": c.locations.half()},
    "must be host ints such as": lambda c: {"shapes": torch.tensor(c.shapes)},
}


@pytest.mark.parametrize("mode", ("real", "fake"))
@pytest.mark.parametrize("message", (*ERRORS, *TYPE_ERRORS))
def test_errors_name_what_does_not_fit(message, mode):
    kind = ValueError if message in ERRORS else TypeError
    arguments = list(wrong((ERRORS | TYPE_ERRORS)[message]))
    if mode == "fake" and not isinstance(arguments[1], torch.Tensor):
        arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(kind, match=message):
        ms_deform_attn(*arguments)


def test_integer_value_is_refused():
    case = small()
    with pytest.raises((TypeError, NotImplementedError), match="float|Int"):
        ms_deform_attn(case.value.int(), case.shapes, case.locations, case.weights.int())


def test_negative_sizes_are_refused():
    case = small()
    with pytest.raises(ValueError, match="positive|\\[-3, -4"):
        ms_deform_attn(case.value, [(-3, -4), (2, 5)], case.locations, case.weights)


WRAPPED = [  # wrong sizes with as many tokens as SHAPES, 22, in arithmetic of 64 bits
    [(3, 4 + 2**62), (2, 5)],
    [(2**32, 2**32), (2, 11)],
    [(2**63 - 1, 2), (4, 6)],
    [(2**33, 2**31), (1, 22)],
    [(-(2**32), -(2**32)), (2, 11)],
    [(3, -4), (2, 17)],
    [(0, 5), (2, 11)],
]


@pytest.mark.parametrize("mode", ("real", "fake", "reference"))
@pytest.mark.parametrize("shapes", WRAPPED, ids=str)
def test_sizes_that_wrap_round_to_the_number_of_tokens_are_refused(shapes, mode):
    case, flat = small(), [size for pair in shapes for size in pair]
    tensors = [t.to("meta") if mode == "fake" else t for t in (case.value, case.locations, case.weights, case.grad)]
    value, locations, weights, grad = tensors
    forward, backward = (_reference_forward, _reference_backward) if mode == "reference" else (FORWARD, BACKWARD)
    for call in (
        lambda: forward(value, flat, locations, weights),
        lambda: backward(grad, value, flat, locations, weights),
    ):
        with pytest.raises(ValueError, match="positive|22 tokens, but spatial_shapes"):
            call()


def test_sizes_beyond_64_bits_are_refused():
    case = small()
    with pytest.raises((ValueError, TypeError, RuntimeError), match="spatial_shapes|[Oo]verflow|int"):
        ms_deform_attn(case.value, [(2**70, 1), (2, 5)], case.locations, case.weights)


GRADIENTS = {
    "grad_output must be .N, Lq, M.D.": lambda g: g[:, 1:],
    "grad_output must have value's dtype": lambda g: g.double(),
    "arguments on (cpu and meta|meta and cpu).* on one device": lambda g: g.to("meta"),
}


@pytest.mark.parametrize("mode", ("real", "reference"))
@pytest.mark.parametrize("message", GRADIENTS)
def test_the_backward_checks_the_gradient_that_it_gets(message, mode):
    """Also a gradient on another device, which PyTorch's dispatcher would accept."""
    case = small()
    backward = BACKWARD if mode == "real" else _reference_backward
    with pytest.raises((ValueError, TypeError), match=message):
        backward(GRADIENTS[message](case.grad), case.value, case.flat_shapes, case.locations, case.weights)


def test_disabled_extension_leaves_the_reference():
    code = (
        "import torch; from eco_m2f import ops; assert ops.compiled_backends() == (), ops.compiled_backends();"
        "w = torch.ones(1, 1, 1, 1, 1); print(ops.build_info());"
        "print(ops.ms_deform_attn(torch.ones(1, 4, 1, 3), [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5), w))"
    )
    environment = os.environ | {
        "ECO_M2F_DISABLE_EXTENSION": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensor([[[1., 1., 1.]]])" in done.stdout and "on cpu: PyTorch reference" in done.stdout


def test_build_info_names_the_backends():
    info = build_info()
    for device in ("cpu", "cuda"):
        kind = "compiled kernel" if device in compiled_backends() else "PyTorch reference"
        assert f"ms_deform_attn on {device}: {kind}" in info
