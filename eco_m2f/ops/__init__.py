"""The op `eco_m2f::ms_deform_attn`, its fused form, and the module around them. Works without compiled kernels."""

from .extension import build_info, compiled_backends
from .flops import FUSED_NAME, OP_NAME, ms_deform_attn_flop_jit
from .fused import ms_deform_attn_fused
from .module import MSDeformAttn
from .ms_deform_attn import ms_deform_attn
from .reference import grid_sample_ms_deform_attn, reference_ms_deform_attn

__all__ = [
    "FUSED_NAME",
    "MSDeformAttn",
    "OP_NAME",
    "build_info",
    "compiled_backends",
    "grid_sample_ms_deform_attn",
    "ms_deform_attn",
    "ms_deform_attn_flop_jit",
    "ms_deform_attn_fused",
    "reference_ms_deform_attn",
]
