"""The attention module: names, initial values, its two ways to compute, precision under autocast, export, errors."""

import math

import pytest
import torch
from op_cases import relative_error
from torch import nn

from eco_m2f.ops import MSDeformAttn, module, reference_ms_deform_attn

SHAPES = [(3, 4), (6, 8), (12, 16)]
TOKENS = sum(h * w for h, w in SHAPES)


@pytest.fixture
def attention():
    """A module without initial values."""
    torch.manual_seed(0)
    attention = MSDeformAttn(64, 3, 8, 4)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.1)
    return attention


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(2, TOKENS, 64, generator=generator) for _ in range(2))
    return query, torch.rand(1, TOKENS, 1, 2, generator=generator), value, SHAPES


def by_hand(attention: MSDeformAttn, query, points, value, shapes):
    """Deformable DETR, Eq. 3, from the parameters."""
    batch, queries, _ = query.shape
    values = attention.value_proj(value).view(batch, -1, 8, 8)
    offsets = attention.sampling_offsets(query).view(batch, queries, 8, 3, 4, 2)
    weights = attention.attention_weights(query).view(batch, queries, 8, 12).softmax(-1).view(batch, queries, 8, 3, 4)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=query.dtype)
    locations = points[:, :, None, :, None] + offsets / sizes[:, None]
    flat = [size for shape in shapes for size in shape]
    return attention.output_proj(reference_ms_deform_attn(values, flat, locations, weights))


ways = pytest.mark.parametrize("one_pass", (True, False))


@pytest.fixture
def choose(monkeypatch):
    def choose(one_pass: bool):
        if one_pass and not module.ONE_PASS_ON_CPU:
            pytest.skip("the CPU kernels are not built")
        monkeypatch.setattr(module, "ONE_PASS_ON_CPU", one_pass)

    return choose


@ways
@pytest.mark.parametrize("points_shape", ((1, TOKENS, 1, 2), (2, TOKENS, 3, 2)))
def test_output_and_gradients(attention, inputs, choose, one_pass, points_shape):
    choose(one_pass)
    attention = attention.double()
    query, _, value, shapes = inputs
    leaves = [query.double(), torch.rand(points_shape, dtype=torch.float64), value.double()]
    leaves = [t.requires_grad_() for t in leaves] + list(attention.parameters())
    out, expected = (f(*leaves[:3], shapes) for f in (attention, lambda *t: by_hand(attention, *t)))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(actual, wanted)


def test_names_and_shapes_of_parameters():
    shapes = {name: tuple(p.shape) for name, p in MSDeformAttn(256, 3, 8, 4).state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (192, 256), "sampling_offsets.bias": (192,),
        "attention_weights.weight": (96, 256), "attention_weights.bias": (96,),
        "value_proj.weight": (256, 256), "value_proj.bias": (256,),
        "output_proj.weight": (256, 256), "output_proj.bias": (256,),
    }  # fmt: skip


def test_first_values_look_in_eight_directions():
    """Head m looks along 2 pi m / 8 on the square, with point p at p + 1 pixels, on all levels."""
    attention = MSDeformAttn(64, 3, 8, 4)
    bias = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    for head in range(8):
        direction = torch.tensor([math.cos(math.pi * head / 4), math.sin(math.pi * head / 4)])
        direction = direction / direction.abs().max()
        for point in range(4):
            for level in range(3):
                torch.testing.assert_close(bias[head, level, point], direction * (point + 1), rtol=1e-5, atol=1e-5)
    for parameter in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()):
        assert not parameter.any()
    assert attention.value_proj.weight.any() and not attention.value_proj.bias.any()


@ways
def test_autocast_keeps_locations_in_full_precision(attention, inputs, choose, one_pass):
    choose(one_pass)
    with torch.no_grad():
        expected = by_hand(attention, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(*inputs)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 3e-2


@ways
def test_export(attention, inputs, choose, one_pass):
    choose(one_pass)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, query, points, value):
            return self.attention(query, points, value, SHAPES)

    program = torch.export.export(Fixed(), inputs[:3])
    assert ("ms_deform_attn_fused" in str(program.graph)) == one_pass
    torch.testing.assert_close(program.module()(*inputs[:3]), by_hand(attention, *inputs), rtol=1e-4, atol=1e-5)


@ways
def test_compile_in_one_graph(attention, inputs, choose, one_pass):
    choose(one_pass)
    torch._dynamo.reset()
    query, points, value, shapes = inputs
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    out = compiled(query.requires_grad_(), points, value, shapes)
    expected = by_hand(attention, query, points, value, shapes)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.sum(), query)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_a_trace_shows_the_plain_op(attention, inputs):
    """For tools that know only its name."""
    from fvcore.nn import FlopCountAnalysis

    from eco_m2f.ops import OP_NAME, ms_deform_attn_flop_jit

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, query, points, value):
            return self.attention(query, points, value, SHAPES)

    counted = FlopCountAnalysis(Fixed(), inputs[:3]).set_op_handle(OP_NAME, ms_deform_attn_flop_jit).by_operator()
    assert counted[OP_NAME.split("::")[1]] == 4 * 2 * TOKENS * 8 * 12 * 8


ERRORS = {
    "must be a multiple of num_heads 5": lambda a, q, r, v: MSDeformAttn(64, 3, 5, 4),
    "must name \\(h, w\\) for num_levels 3": lambda a, q, r, v: a(q, r, v, SHAPES[:2]),
    "must be \\[N, tokens, 64\\]": lambda a, q, r, v: a(q[..., :32], r, v, SHAPES),
    "reference_points \\(1, 5, 1, 2\\) must be": lambda a, q, r, v: a(q, r[:, :5], v, SHAPES),
    "251 tokens": lambda a, q, r, v: a(q, r, v[:, :251], SHAPES),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_what_does_not_fit(attention, inputs, message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](attention, *inputs[:3])
