"""The cost of one call of the op.

It is one multiply-add per corner, channel and sampling point: 4 * N * Lq * M * L * P * D. fvcore counts the same for
the `grid_sampler` calls of a fallback. Published Mask2Former numbers leave out the op, since fvcore has no handle for a
CUDA op. That is the `paper` convention, and fvcore's default here. The `full` convention adds the handle below.
"""

from math import prod

from torch.utils.flop_counter import register_flop_formula

OP_NAME = "eco_m2f::ms_deform_attn"
FUSED_NAME = "eco_m2f::ms_deform_attn_fused"  # its arguments 0 and 2 have the same shapes


def multiply_adds(value_shape: list[int], location_shape: list[int]) -> int:
    """Multiply-adds of one forward; value [N,S,M,D], locations [N,Lq,M,L,P,2]."""
    return 4 * prod(location_shape[:-1]) * value_shape[-1]


def ms_deform_attn_flop_jit(inputs: list, outputs: list) -> int:
    """The handle for fvcore: `FlopCountAnalysis(...).set_op_handle(OP_NAME, ms_deform_attn_flop_jit)`."""
    from fvcore.nn.jit_handles import get_shape

    return multiply_adds(get_shape(inputs[0]), get_shape(inputs[2]))


def register_torch_formulas(forward_op, backward_op) -> None:
    """Registers an op and its backward with `torch.utils.flop_counter.FlopCounterMode`.

    That counts 2 per multiply-add. The backward costs twice the forward: a dot product and a scatter per corner.
    """

    @register_flop_formula(forward_op)
    def forward_flops(value_shape, spatial_shapes, location_shape, *args, out_shape=None, **kwargs):
        return 2 * multiply_adds(value_shape, location_shape)

    @register_flop_formula(backward_op)
    def backward_flops(grad_shape, value_shape, spatial_shapes, location_shape, *args, **kwargs):
        return 4 * multiply_adds(value_shape, location_shape)
