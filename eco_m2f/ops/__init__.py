"""The op `eco_m2f::ms_deform_attn` and the attention module around it; importable with nothing compiled."""

from .extension import build_info, compiled_backends
from .flops import OP_NAME, ms_deform_attn_flop_jit
from .module import MSDeformAttn
from .ms_deform_attn import ms_deform_attn
from .reference import grid_sample_ms_deform_attn, reference_ms_deform_attn

__all__ = [
    "MSDeformAttn",
    "OP_NAME",
    "build_info",
    "compiled_backends",
    "grid_sample_ms_deform_attn",
    "ms_deform_attn",
    "ms_deform_attn_flop_jit",
    "reference_ms_deform_attn",
]
