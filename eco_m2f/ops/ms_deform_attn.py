"""The op `eco_m2f::ms_deform_attn`: its schema and its registrations with PyTorch for all devices.

PyTorch's dispatcher chooses the kernel by device: a compiled one for CPU or CUDA (`csrc/`) if it was built, else the
PyTorch reference. Nothing falls back silently after a failure. `reference.py` has the mathematics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .extension import load_extension
from .flops import register_torch_formulas
from .reference import reference_ms_deform_attn, reference_ms_deform_attn_backward

LIBRARY = torch.library.Library("eco_m2f", "DEF")
LIBRARY.define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor"
)
LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)
FORWARD = torch.ops.eco_m2f.ms_deform_attn.default
BACKWARD = torch.ops.eco_m2f.ms_deform_attn_backward.default


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int] | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 2), without its projections.

    Args:
        value: [N, S, M, D], S = sum of h * w over the levels; float64, float32, float16 or bfloat16.
        spatial_shapes: host ints, [(h, w), ...] or flat [h0, w0, h1, w1, ...].
        sampling_locations: [N, Lq, M, L, P, 2], (x, y) relative to the level's size, 0..1 inside. float32, or float64
            for a float64 value. Half precision would displace samples by up to 0.1 pixel and is refused.
        attention_weights: [N, Lq, M, L, P] in value's dtype.

    Returns:
        [N, Lq, M * D] in value's dtype.

    Raises:
        ValueError: shapes do not fit together. TypeError: a dtype is wrong, or spatial_shapes is a tensor.
    """
    return FORWARD(value, flat_shapes(spatial_shapes), sampling_locations, attention_weights)


def flat_shapes(spatial_shapes: Sequence[int] | Sequence[tuple[int, int]]) -> list[int]:
    """[(h, w), ...] or [h0, w0, ...] -> [h0, w0, ...]. Tensors are refused: reading one would wait for the device."""
    if isinstance(spatial_shapes, Tensor):
        raise TypeError("spatial_shapes must be host ints such as [(32, 64), (64, 128)], not a tensor")
    if len(spatial_shapes) and isinstance(spatial_shapes[0], (tuple, list)):
        return [size for pair in spatial_shapes for size in pair]
    return list(spatial_shapes)


def check_arguments(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> None:
    """Raises ValueError or TypeError, with the wrong argument, if the arguments do not fit together."""
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "expected value [N,S,M,D], sampling_locations [N,Lq,M,L,P,2], attention_weights [N,Lq,M,L,P], got "
            f"{tuple(value.shape)}, {tuple(locations.shape)}, {tuple(weights.shape)}"
        )
    if len(shapes) != 2 * locations.shape[3]:
        raise ValueError(f"sampling_locations have {locations.shape[3]} levels, but spatial_shapes is {list(shapes)}")
    check_tokens(value, shapes)
    if tuple(locations.shape[:-1]) != tuple(weights.shape) or locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} must be attention_weights {tuple(weights.shape)} + (2,)"
        )
    if value.shape[0] != locations.shape[0] or value.shape[2] != locations.shape[2]:
        raise ValueError(
            f"batch size and heads differ: value {tuple(value.shape)}, sampling_locations {tuple(locations.shape)}"
        )
    check_dtypes(value, locations, weights)


def check_tokens(value: Tensor, shapes: Sequence[int]) -> None:
    """Raises ValueError unless value [N, S, M, D] consists of maps of these sizes."""
    if not all(size > 0 for size in shapes):
        raise ValueError(f"spatial_shapes must be positive, got {list(shapes)}")
    tokens = sum(h * w for h, w in zip(shapes[0::2], shapes[1::2]))
    if value.shape[1] != tokens:
        raise ValueError(f"value has {value.shape[1]} tokens, but spatial_shapes {list(shapes)} make {tokens}")


def check_grad_output(grad_output: Tensor, value: Tensor, queries: int) -> None:
    """Raises ValueError or TypeError unless the gradient fits the op's output [N, queries, M * D]."""
    wanted = (value.shape[0], queries, value.shape[2] * value.shape[3])
    if tuple(grad_output.shape) != wanted:
        raise ValueError(f"grad_output must be [N, Lq, M*D] = {list(wanted)}, got {list(grad_output.shape)}")
    if grad_output.dtype != value.dtype:
        raise TypeError(f"grad_output must have value's dtype {value.dtype}, got {grad_output.dtype}")
    if grad_output.device != value.device:
        raise ValueError(f"arguments on {value.device} and {grad_output.device}: put them on one device")


def check_dtypes(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    """See `check_arguments`."""
    expected = torch.float64 if value.dtype == torch.float64 else torch.float32
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"value must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if locations.dtype != expected:
        raise TypeError(f"sampling_locations must be {expected} for a {value.dtype} value, got {locations.dtype}")
    if weights.dtype != value.dtype:
        raise TypeError(f"attention_weights must have value's dtype {value.dtype}, got {weights.dtype}")
    if not value.device == locations.device == weights.device:
        raise ValueError(
            f"arguments on {value.device}, {locations.device} and {weights.device}: put them on one device"
        )


def _fake_forward(value, spatial_shapes, sampling_locations, attention_weights):
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    check_grad_output(grad_output, value, sampling_locations.shape[1])
    return tuple(t.new_empty(t.shape) for t in (value, sampling_locations, attention_weights))


def _reference_forward(value, spatial_shapes, sampling_locations, attention_weights):
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    return reference_ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def _reference_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    check_grad_output(grad_output, value, sampling_locations.shape[1])
    return reference_ms_deform_attn_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights)


def _setup_context(ctx, inputs, output):
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _autograd_backward(ctx, grad_output):
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grads = BACKWARD(grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights)
    return grads[0], None, grads[1], grads[2]


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("ms_deform_attn has no second derivative; differentiate reference_ms_deform_attn twice")


def _autocast(value, spatial_shapes, sampling_locations, attention_weights):
    """Value keeps the dtype of its projection, weights get the same, locations get full precision."""
    locations = sampling_locations.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return FORWARD(value, spatial_shapes, locations, attention_weights.to(value.dtype))


def _register() -> None:
    LIBRARY.impl("ms_deform_attn", _reference_forward, "CompositeExplicitAutograd")
    LIBRARY.impl("ms_deform_attn_backward", _reference_backward, "CompositeExplicitAutograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("ms_deform_attn", _autocast, key)
    torch.library.register_fake(FORWARD, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(BACKWARD, _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(FORWARD, _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
    torch.library.register_autograd(BACKWARD, _no_double_backward, lib=LIBRARY)
    register_torch_formulas(FORWARD.overloadpacket, BACKWARD.overloadpacket)
    load_extension()


_register()
