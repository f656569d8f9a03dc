"""Inputs of deformable attention, and one way to call each of its backends on the CPU.

"cuda on host" is the source of the CUDA kernels, compiled for the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import cuda_on_host
import pytest
import torch
from torch import Tensor

from eco_m2f.ops import compiled_backends, ms_deform_attn, reference_ms_deform_attn
from eco_m2f.ops.extension import BUILD_COMMAND
from eco_m2f.ops.reference import reference_ms_deform_attn_backward

COMPILED = ("avx512", "avx2", "baseline", "portable")
BACKENDS = ("reference", *COMPILED, "cuda on host")
PYRAMID = [(3, 4), (6, 8), (12, 16)]


@dataclass
class Case:
    """The arguments of one call, and the gradient of its output."""

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    grad: Tensor

    @property
    def flat_shapes(self) -> list[int]:
        return [size for shape in self.shapes for size in shape]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def to(self, dtype: torch.dtype) -> "Case":
        """The case with value in that dtype; locations stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return Case(
            self.value.to(dtype), self.shapes, self.locations.to(wide), self.weights.to(dtype), self.grad.to(dtype)
        )

    def with_(self, **changes) -> "Case":
        return replace(self, **changes)


def make_case(
    shapes=PYRAMID, batch=2, queries=50, heads=8, channels=32, points=4, dtype=torch.float64, seed=0, margin=0.15
) -> Case:
    """Random inputs, with points up to `margin` times the map's size outside the map."""
    generator = torch.Generator().manual_seed(seed)
    tokens, grid = sum(h * w for h, w in shapes), (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * (1 + 2 * margin) - margin
    weights = torch.rand(grid, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum((-2, -1), keepdim=True)
    grad = torch.randn(batch, queries, heads * channels, generator=generator, dtype=torch.float64)
    return Case(value, shapes, locations, weights, grad).to(dtype)


def away_from_knots(case: Case, distance: float = 1e-3) -> Case:
    """Moves the points: no pixel coordinate stays within `distance` of an integer, where slopes jump."""
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64)[:, None]
    pixels = case.locations.double() * sizes - 0.5
    base = pixels.floor()
    pixels = base + (pixels - base).clamp(distance, 1 - distance)
    return case.with_(locations=((pixels + 0.5) / sizes).to(case.locations.dtype))


@contextmanager
def cpu_sampler(limit: str) -> Iterator[str]:
    """Limits the compiled CPU kernels to this instruction set, in all threads.

    Args:
        limit: "avx512", "avx2", "baseline" (the compiler's own target), "portable" (kernels without staging).

    Yields:
        The instruction set in use: a lesser one if the processor lacks the given one.

    Raises:
        RuntimeError: no CPU kernels were built. ValueError: limit is unknown.
    """
    if "cpu" not in compiled_backends():
        raise RuntimeError(f"no CPU kernels are loaded; build them: {BUILD_COMMAND}")
    try:
        yield torch.ops.eco_m2f.limit_cpu_sampler(limit)
    finally:
        torch.ops.eco_m2f.limit_cpu_sampler("")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Selects a backend, or skips the test if this machine or build lacks it."""
    if backend in ("reference", "cuda on host"):
        yield
        return
    if "cpu" not in compiled_backends():
        pytest.skip("the CPU kernels are not built: ECO_M2F_BUILD=cpu pip install --no-build-isolation --no-deps -e .")
    with cpu_sampler(backend) as used:
        if used != backend:
            pytest.skip(f"this processor has no {backend}")
        yield


def run(backend: str, case: Case) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """-> output, gradients of value, locations and weights."""
    arguments = (case.value, case.flat_shapes, case.locations, case.weights)
    with use(backend):
        if backend == "reference":
            return reference_ms_deform_attn(*arguments), reference_ms_deform_attn_backward(case.grad, *arguments)
        if backend == "cuda on host":
            return cuda_on_host.run(*arguments, case.grad)
        leaves = [t.detach().clone().requires_grad_() for t in case.leaves]
        out = ms_deform_attn(leaves[0], case.shapes, *leaves[1:])
        return out.detach(), torch.autograd.grad(out, leaves, case.grad)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()
