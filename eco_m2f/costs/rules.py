"""The cost of an operator in the paper's convention, and the shape of its output.

A rule takes the output and the arguments of an operator and returns FLOPs. A multiply-add is one FLOP.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor


def _linear(out, x, weight, bias=None) -> int:
    return out.numel() * weight.shape[1]


def _mm(out, a, b, **_) -> int:
    return out.numel() * a.shape[-1]


def _addmm(out, bias, a, b, **_) -> int:
    return out.numel() * a.shape[-1]


def _conv(out, x, weight, *_, **__) -> int:
    return out.numel() * prod(weight.shape[1:])


def _conv_general(out, x, weight, bias, stride, padding, dilation, transposed, *_) -> int:
    return x.shape[0] * prod(weight.shape) * prod((x if transposed else out).shape[2:])


def _attention(out, q, k, v, attn_mask=None, *_, **__) -> int:
    """The product of attention and v, and that of q and k unless it is masked.

    q [..., L, E], k [..., S, E], v [..., S, Ev]. A bias, such as Swin's, is no mask.
    """
    weights = prod(q.shape[:-1]) * k.shape[-2]
    masked = attn_mask is not None and attn_mask.dtype == torch.bool
    return weights * v.shape[-1] + (0 if masked else weights * q.shape[-1])


def _batch_norm(out, x, weight, bias, mean, var, training, *_, **__) -> int:
    return x.numel() * ((5 if training else 2) if weight is not None else (4 if training else 1))


def _norm(affine: int) -> Callable:
    """5 per element of the input, or 4 without an affine weight. The weight is argument number `affine`, if given."""
    return lambda out, *args, **_: args[0].numel() * (4 if args[affine : affine + 1] in ((), (None,)) else 5)


def _per_input(scale: int) -> Callable:
    return lambda out, x, *_, **__: scale * x.numel()


def _per_output(scale: int) -> Callable:
    return lambda out, *_, **__: scale * out.numel()


# By the operator's name. Other operators cost nothing.
FLOPS: dict[str, Callable[..., int]] = {
    "aten::linear": _linear,
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::conv1d": _conv,
    "aten::conv2d": _conv,
    "aten::conv3d": _conv,
    "aten::convolution": _conv_general,
    "aten::scaled_dot_product_attention": _attention,
    "aten::layer_norm": _norm(affine=2),
    "aten::group_norm": _norm(affine=2),
    "aten::batch_norm": _batch_norm,
    "aten::upsample_bilinear2d": _per_output(4),
    "aten::upsample_nearest2d": _per_output(1),
    "aten::grid_sampler": _per_output(4),
    "aten::adaptive_avg_pool2d": _per_input(1),
}


def _resized(x, size, align_corners, scales=None, *_) -> Tensor:
    size = size if size is not None else [int(n * f) for n, f in zip(x.shape[2:], scales)]
    return x.new_empty(*x.shape[:2], *size)


def _like(x, *_, **__) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def _elementwise(a, b, **_) -> Tensor:
    """Only for floats: other types may combine to a third type."""
    if not a.is_floating_point():
        return NotImplemented
    shape = torch.broadcast_shapes(a.shape, b.shape) if isinstance(b, Tensor) else a.shape
    return _like(a) if shape == a.shape else a.new_empty(shape)


# PyTorch computes the shapes of these operators in Python, slowly. These functions are faster.
# They return NotImplemented if the shape is not obvious.
SHAPES: dict[str, Callable[..., Tensor]] = {
    "aten::linear": lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "aten::layer_norm": _like,
    "aten::group_norm": _like,
    "aten::batch_norm": _like,
    "aten::relu": _like,
    "aten::hardtanh": _like,
    "aten::hardtanh_": lambda x, *_: x,
    "aten::gelu": _like,
    "aten::add": _elementwise,
    "aten::sub": _elementwise,
    "aten::mul": _elementwise,
    "aten::div": _elementwise,
    "aten::scaled_dot_product_attention": lambda q, k, v, *_, **__: q.new_empty(*q.shape[:-1], v.shape[-1]),
    "aten::upsample_bilinear2d": _resized,
}
