"""The op `eco_m2f::ms_deform_attn_fused`: `ms_deform_attn` together with its softmax and sampling locations.

It takes offsets in pixels, attention logits and reference points. It neither writes locations and weights to memory nor
keeps them for the backward, which computes them again. The compiled kernels run in one pass (CUDA: up to 96 samples per
query and head). Else PyTorch operators run, and then `ms_deform_attn`. Both round in the same way: location =
reference + offset / (w, h), a softmax in at least float32, and the pixel of `reference.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .flops import register_torch_formulas
from .ms_deform_attn import BACKWARD, FORWARD, LIBRARY, check_grad_output, check_tokens, flat_shapes

LIBRARY.define(
    "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor sampling_offsets, Tensor attention_logits,"
    " Tensor reference_points) -> Tensor"
)
LIBRARY.define(
    "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_offsets,"
    " Tensor attention_logits, Tensor reference_points) -> (Tensor, Tensor, Tensor)"  # of value, offsets, logits
)
FUSED = torch.ops.eco_m2f.ms_deform_attn_fused.default
FUSED_BACKWARD = torch.ops.eco_m2f.ms_deform_attn_fused_backward.default


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[int] | Sequence[tuple[int, int]],
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Multi-scale deformable attention from offsets and logits.

    Args:
        value: [N, S, M, D], S = sum of h * w over the levels; float64, float32, float16 or bfloat16.
        spatial_shapes: host ints, [(h, w), ...] or flat [h0, w0, h1, w1, ...].
        sampling_offsets: [N, Lq, M, L, P, 2], (x, y) in pixels of their level.
        attention_logits: [N, Lq, M, L, P]; the softmax runs over all L * P.
        reference_points: [N or 1, Lq, L or 1, 2], (x, y) in 0..1. All three: float32, or float64 for such a value.

    Returns:
        [N, Lq, M * D] in value's dtype.

    Raises:
        ValueError: shapes do not fit together. TypeError: a dtype is wrong, or spatial_shapes is a tensor.
    """
    return FUSED(value, flat_shapes(spatial_shapes), sampling_offsets, attention_logits, reference_points)


def level_sizes(spatial_shapes: Sequence[int], like: Tensor) -> Tensor:
    """(w, h) per level, [L, 1, 2], filled on the device, because a copy from the host can wait for the device."""
    sizes = [like.new_full((1,), spatial_shapes[i ^ 1]) for i in range(len(spatial_shapes))]
    return torch.cat(sizes).view(-1, 1, 2) if sizes else like.new_empty(0, 1, 2)


def compose(spatial_shapes: Sequence[int], offsets: Tensor, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The locations and weights for `ms_deform_attn`, in the dtype of the offsets."""
    locations = reference[:, :, None, :, None] + offsets / level_sizes(spatial_shapes, offsets)  # [N, Lq, M, L, P, 2]
    return locations, logits.flatten(3).softmax(-1).view(logits.shape)


def check_fused_arguments(
    value: Tensor, shapes: Sequence[int], offsets: Tensor, logits: Tensor, reference: Tensor
) -> None:
    """Raises ValueError or TypeError, with the fused op's argument names, for arguments that do not fit."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    for tensor in (offsets, logits, reference):
        if tensor.dtype != wide:
            raise TypeError(
                f"sampling_offsets, attention_logits and reference_points must be {wide} for a {value.dtype} value, "
                f"got {tensor.dtype}"
            )
    if offsets.dim() != 6 or len(shapes) != 2 * offsets.shape[3] or tuple(offsets.shape[:-1]) != tuple(logits.shape):
        raise ValueError(
            f"sampling_offsets {tuple(offsets.shape)} must be [N, Lq, M, L, P, 2] and attention_logits "
            f"{tuple(logits.shape)} [N, Lq, M, L, P], with L for spatial_shapes {list(shapes)}"
        )
    if value.dim() != 4:
        raise ValueError(f"expected value [N,S,M,D], got {tuple(value.shape)}")
    check_tokens(value, shapes)
    batch, queries, levels = offsets.shape[0], offsets.shape[1], offsets.shape[3]
    fits = reference.dim() == 4 and reference.shape[1] == queries and reference.shape[3] == 2
    if not fits or reference.shape[0] not in (1, batch) or reference.shape[2] not in (1, levels):
        raise ValueError(
            f"reference_points {tuple(reference.shape)} must be [{batch} or 1, {queries}, {levels} or 1, 2]"
        )


def _composed_forward(value, spatial_shapes, sampling_offsets, attention_logits, reference_points):
    check_fused_arguments(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)
    locations, weights = compose(spatial_shapes, sampling_offsets, attention_logits, reference_points)
    return FORWARD(value, spatial_shapes, locations, weights.to(value.dtype))


def _fake_forward(value, spatial_shapes, sampling_offsets, attention_logits, reference_points):
    check_fused_arguments(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)
    return value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])


def _composed_backward(grad_output, value, spatial_shapes, sampling_offsets, attention_logits, reference_points):
    check_fused_arguments(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)
    check_grad_output(grad_output, value, sampling_offsets.shape[1])
    locations, weights = compose(spatial_shapes, sampling_offsets, attention_logits, reference_points)
    narrow = weights.to(value.dtype)
    grad_value, grad_locations, grad_weights = BACKWARD(grad_output, value, spatial_shapes, locations, narrow)
    grad_weights = grad_weights.to(weights.dtype)
    total = (grad_weights * weights).sum((-2, -1), keepdim=True)
    grad_offsets = grad_locations / level_sizes(spatial_shapes, sampling_offsets)
    return grad_value, grad_offsets, weights * (grad_weights - total)


def _fake_backward(grad_output, value, spatial_shapes, sampling_offsets, attention_logits, reference_points):
    check_fused_arguments(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)
    check_grad_output(grad_output, value, sampling_offsets.shape[1])
    return tuple(t.new_empty(t.shape) for t in (value, sampling_offsets, attention_logits))


def _setup_context(ctx, inputs, output):
    value, ctx.spatial_shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _autograd_backward(ctx, grad_output):
    value, offsets, logits, reference = ctx.saved_tensors
    grads = FUSED_BACKWARD(grad_output, value, ctx.spatial_shapes, offsets, logits, reference)
    grad_reference = None
    if ctx.needs_input_grad[4]:  # location = point + offset / (w, h)
        by_level = grads[1].sum((2, 4), keepdim=True) * level_sizes(ctx.spatial_shapes, offsets)
        grad_reference = by_level[:, :, 0, :, 0].sum_to_size(reference.shape)
    return grads[0], None, grads[1], grads[2], grad_reference


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("ms_deform_attn_fused has no second derivative; differentiate the reference op twice")


def _autocast(value, spatial_shapes, sampling_offsets, attention_logits, reference_points):
    """Value keeps the dtype of its projection; the others get full precision."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return FUSED(
            value, spatial_shapes, sampling_offsets.to(wide), attention_logits.to(wide), reference_points.to(wide)
        )


def _register() -> None:
    LIBRARY.impl("ms_deform_attn_fused", _composed_forward, "CompositeExplicitAutograd")
    LIBRARY.impl("ms_deform_attn_fused_backward", _composed_backward, "CompositeExplicitAutograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("ms_deform_attn_fused", _autocast, key)
    torch.library.register_fake(FUSED, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(FUSED_BACKWARD, _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(FUSED_BACKWARD, _no_double_backward, lib=LIBRARY)
    torch.library.register_autograd(FUSED, _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
    register_torch_formulas(FUSED.overloadpacket, FUSED_BACKWARD.overloadpacket)


_register()
