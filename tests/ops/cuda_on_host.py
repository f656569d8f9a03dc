"""Runs the source of the CUDA kernels on the CPU, by a shim that replaces CUDA (cuda_on_host.cpp)."""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "eco_m2f" / "ops" / "csrc" / "cuda"
STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # as enum Storage
GUARD = 64  # elements around each tensor, NaN, to betray a stray write


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built once per process. Skips the test without a C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = f"{folder}/cuda_on_host.so"
    # fmt: off
    command = [
        compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w",
        # A misaligned vector read is an error on a GPU: end the process here too.
        "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
        f"-I{Path(torch.__file__).parent / 'include'}", f"-I{KERNELS}", str(HERE / "cuda_on_host.cpp"), "-o", target,
    ]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(target)
    for name in ("host_forward", "host_backward", "host_plan"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.host_launches.restype = loaded.host_first_point.restype = ctypes.c_int64
    return loaded


def ints(values) -> ctypes.Array:
    values = list(values)
    return (ctypes.c_int64 * len(values))(*values)


class Guarded:
    """A contiguous copy of a tensor between two guards; `shift` elements off 16-byte alignment."""

    def __init__(self, tensor: Tensor, shift: int = 0):
        self.buffer = torch.full((tensor.numel() + 2 * GUARD + shift,), torch.nan, dtype=tensor.dtype)
        self.begin, self.end = GUARD + shift, GUARD + shift + tensor.numel()
        self.tensor = self.buffer[self.begin : self.end].view(tensor.shape)
        self.tensor.copy_(tensor)

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.buffer.data_ptr() + self.begin * self.buffer.element_size())

    def check(self) -> None:
        outside = torch.cat((self.buffer[: self.begin], self.buffer[self.end :]))
        assert outside.isnan().all(), "a kernel wrote beside its tensor"


def run(value, flat_shapes, locations, weights, grad, reference=None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """-> output, gradients. The launches are those of the CUDA build. Unaligned inputs stay unaligned.

    Reference points select the fused kernels; locations are then offsets, and weights are logits.
    """
    batch, tokens, heads, channels = value.shape
    levels, points = locations.shape[3:5]
    sizes = ints((batch, tokens, heads, channels, locations.shape[1], levels, points))
    shapes, storage = ints(flat_shapes), STORAGE.index(value.dtype)
    shift = 1 if value.data_ptr() % 16 else 0
    inputs = [Guarded(t, shift if t is value else 0) for t in (value, locations, weights)]
    strides, fused = ints((0, 0, 0)), None
    if reference is not None:
        fused, (images, _, by_level, _) = Guarded(reference), reference.shape
        row = 2 * by_level
        strides = ints((row * reference.shape[1] if images > 1 else 0, row, 2 if by_level > 1 else 0))
    given = [*(t.pointer for t in inputs), fused.pointer if fused else None, strides]
    out = Guarded(torch.full_like(grad, torch.nan, memory_format=torch.contiguous_format))
    if out.tensor.numel():  # as ms_deform_attn.cpp
        error = library().host_forward(sizes, shapes, storage, *given, out.pointer)
        assert error is None, error
    nan = functools.partial(torch.full_like, fill_value=torch.nan, memory_format=torch.contiguous_format)
    zeros = torch.zeros(value.shape, dtype=locations.dtype)
    held, grads = Guarded(grad), [Guarded(zeros), Guarded(nan(locations)), Guarded(nan(weights))]
    if weights.numel():
        error = library().host_backward(sizes, shapes, storage, held.pointer, *given, *(t.pointer for t in grads))
        assert error is None, error
    for guarded in (out, *grads, *inputs):
        guarded.check()
    return out.tensor, (grads[0].tensor.to(value.dtype), grads[1].tensor, grads[2].tensor)
