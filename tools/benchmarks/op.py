"""Measures deformable attention alone, forward and with its backward, compared with PyTorch's own operators.

    python tools/benchmarks/op.py --threads 2 --rounds 15 --output output/op_cpu.csv
    python tools/benchmarks/op.py --threads 2 --rounds 15 --from-logits --output output/op_cpu_from_logits.csv
    python tools/benchmarks/op.py --device cuda --dtype float16 --rounds 50 --output output/op_cuda.csv

If torch-ms-deform-attn is installed, it is measured too. With --from-logits the softmax and the sampling locations are
part of the work, and the fused op is measured too. The bound is the time to move each input and output once, at the
speed of copying memory in the same run. timing.py describes the timing.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timing
import torch
from timing import DTYPES, OURS, positive
from torch import Tensor

from eco_m2f import ops
from eco_m2f.engine.command_line import run
from eco_m2f.ops.fused import compose

COPY_BYTES = 2**28  # larger than all caches


@dataclass(frozen=True)
class Shape:
    """The sizes of one model's call. `queries` 0 means one per token, as in an encoder."""

    levels: tuple[tuple[int, int], ...]
    queries: int = 0
    points: int = 4
    heads: int = 8
    channels: int = 32

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def flat(self) -> list[int]:
        return [size for level in self.levels for size in level]


DETR_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
SHAPES = {
    "mask2former-cityscapes": Shape(((32, 64), (64, 128), (128, 256))),  # 1024 x 2048 pixels
    "mask2former-coco": Shape(((25, 42), (50, 84), (100, 167))),  # 800 x 1333
    "mask2former-coco-train": Shape(((32, 32), (64, 64), (128, 128))),  # 1024 x 1024
    "deformable-detr-encoder": Shape(DETR_LEVELS),  # 800 x 1333
    "deformable-detr-decoder": Shape(DETR_LEVELS, queries=300),
    "rt-detr-decoder": Shape(((80, 80), (40, 40), (20, 20)), queries=300),  # 640 x 640
}


@dataclass
class OpInputs:
    """The arguments of one call, before and after the softmax and the locations, and the output's gradient."""

    shape: Shape
    value: Tensor
    offsets: Tensor
    logits: Tensor
    reference: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    def leaves(self, from_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of a contestant, by which it is also differentiated."""
        pair = (self.offsets, self.logits) if from_logits else (self.locations, self.weights)
        return self.value, *pair


def op_inputs(shape: Shape, batch: int, pattern: str, dtype: torch.dtype, device: str) -> OpInputs:
    """Random inputs. Points of the pattern "encoder" are around the query, as in an untrained encoder: 1 to `points`
    pixels along the head's direction, with 1 pixel of noise. A decoder's queries are anywhere. Points of "uniform" are
    anywhere, the worst case.
    """
    generator = torch.Generator().manual_seed(0)
    queries = shape.queries or shape.tokens
    grid = (batch, queries, shape.heads, len(shape.levels), shape.points)
    reference = reference_points(shape, generator)
    offsets = sampling_offsets(shape, grid, reference, pattern, generator)
    logits = torch.randn(grid, generator=generator)
    value = torch.randn(batch, shape.tokens, shape.heads, shape.channels, generator=generator)
    grad = torch.randn(batch, queries, shape.heads * shape.channels, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    offsets, logits, reference = (t.to(device, wide) for t in (offsets, logits, reference))
    locations, weights = compose(shape.flat, offsets, logits, reference)
    value, weights, grad = (t.to(device, dtype) for t in (value, weights, grad))
    return OpInputs(shape, value, offsets, logits, reference, locations, weights, grad)


def reference_points(shape: Shape, generator: torch.Generator) -> Tensor:
    """(x, y) of each query, [1, queries, 1, 2]: pixel centres for an encoder, random points for a decoder."""
    if shape.queries:
        return torch.rand(1, shape.queries, 1, 2, generator=generator)
    centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shape.levels]
    return torch.cat(centres).flip(-1)[None, :, None]


def sampling_offsets(
    shape: Shape, grid: tuple[int, ...], reference: Tensor, pattern: str, generator: torch.Generator
) -> Tensor:
    """Offsets in pixels from the reference, [*grid, 2]; pattern: see `op_inputs`."""
    if pattern == "uniform":
        sizes = torch.tensor([(w, h) for h, w in shape.levels], dtype=torch.float32)[:, None]
        return (torch.rand(*grid, 2, generator=generator) - reference[:, :, None, :, None]) * sizes
    attention = ops.MSDeformAttn(shape.heads * shape.channels, len(shape.levels), shape.heads, shape.points)
    start = attention.sampling_offsets.bias.detach().view(grid[2:] + (2,))
    return start + torch.randn(*grid, 2, generator=generator)


Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def op_contestants(inputs: OpInputs, names: Sequence[str], from_logits: bool = False) -> dict[str, Contestant]:
    """Name -> function of `inputs.leaves(from_logits)`; ours comes first.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    flat = inputs.shape.flat
    table: dict[str, Contestant] = {
        OURS: lambda *t: ops.ms_deform_attn(t[0], flat, t[1], t[2]),
        "embedding_bag": lambda *t: ops.reference_ms_deform_attn(t[0], flat, t[1], t[2]),
        "grid_sample": lambda *t: ops.grid_sample_ms_deform_attn(t[0], flat, t[1], t[2]),
    }
    if importlib.util.find_spec("torch_ms_deform_attn"):
        table["torch-ms-deform-attn"] = rival(inputs)
    if from_logits:
        fused = {f"{OURS}_fused": lambda *t: ops.ms_deform_attn_fused(t[0], flat, t[1], t[2], inputs.reference)}
        table = {name: after_softmax(function, inputs) for name, function in table.items()} | fused
    unknown = set(names) - set(table)
    if unknown:
        raise ValueError(f"no contestant {sorted(unknown)}: choose from {sorted(table)}, or install it")
    return {name: function for name, function in table.items() if not names or name == OURS or name in names}


def rival(inputs: OpInputs) -> Contestant:
    """The op of the package torch-ms-deform-attn."""
    from torch_ms_deform_attn import ms_deform_attn

    sizes = torch.tensor(inputs.shape.levels, device=inputs.value.device)
    areas = [h * w for h, w in inputs.shape.levels]
    starts = torch.tensor([sum(areas[:i]) for i in range(len(areas))], device=inputs.value.device)
    return lambda *t: ms_deform_attn(t[0], sizes, starts, t[1].to(t[2].dtype), t[2])


def after_softmax(function: Contestant, inputs: OpInputs) -> Contestant:
    """The contestant from offsets and logits, with PyTorch's softmax and arithmetic before it."""

    def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations, weights = compose(inputs.shape.flat, offsets, logits, inputs.reference)
        return function(value, locations, weights.to(value.dtype))

    return call


def copy_speed(device: str, rounds: int = 5, size: int = COPY_BYTES) -> float:
    """Bytes per millisecond, read and written, of copying a tensor; the best of several rounds."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timing.timed(lambda: target.copy_(source), device)[0] for _ in range(rounds + 1))


def compulsory_bytes(inputs: OpInputs, from_logits: bool) -> dict[str, int]:
    """The bytes that must move: each input is read, each output written. The backward reads the inputs again."""
    leaves = sum(t.nbytes for t in inputs.leaves(from_logits)) + (inputs.reference.nbytes if from_logits else 0)
    return {"forward": leaves + inputs.grad.nbytes, "forward_backward": 3 * leaves + 2 * inputs.grad.nbytes}


def measure_op(
    inputs: OpInputs, names: Sequence[str], rounds: int, device: str, from_logits: bool = False, calls: int = 1
) -> list[dict]:
    """One row per contestant, with medians of the forward, and of the forward with its backward."""
    contestants = op_contestants(inputs, names, from_logits)
    leaves = [t.detach().clone().requires_grad_() for t in inputs.leaves(from_logits)]
    turns = {}
    for name, function in contestants.items():
        turns[name, "forward"], turns[name, "forward_backward"] = passes(function, leaves, inputs.grad)
    samples = timing.take_turns(turns, rounds, device, calls)
    speed = copy_speed(device)
    bounds = {kind: count / speed for kind, count in compulsory_bytes(inputs, from_logits).items()}
    by_name = {name: {kind: samples[name, kind] for kind in bounds} for name in contestants}
    return [{"contestant": name, **columns(by_name[name], by_name[OURS], bounds)} for name in contestants]


def passes(function: Contestant, leaves: list[Tensor], grad: Tensor) -> tuple[Callable, Callable]:
    """Two calls: the forward, and the forward with its backward."""

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return forward, both


def columns(own: dict[str, list], ours: dict[str, list], bounds: dict[str, float]) -> dict[str, str]:
    """{column: number}, from the (wall, CPU) milliseconds of the rounds."""
    made = {}
    for kind, bound in bounds.items():
        wall, cpu = (statistics.median(times[i] for times in own[kind]) for i in range(2))
        made |= {f"{kind}_wall_ms": f"{wall:.3f}", f"{kind}_cpu_ms": f"{cpu:.3f}"}
        made[f"{kind}_ratio"] = f"{timing.median_ratio(own[kind], ours[kind]):.2f}"
        made[f"{kind}_bound_ms"] = f"{bound:.4g}"
        made[f"{kind}_over_bound"] = f"{wall / bound:.2f}"
    return made


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=9)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=sorted(SHAPES), default=["mask2former-cityscapes"])
    add("--patterns", nargs="+", choices=("encoder", "uniform"), default=["encoder", "uniform"])
    add("--contestants", nargs="+", default=[], help="contestants besides eco_m2f; default: all that are installed")
    add("--from-logits", action="store_true", help="include the softmax and the locations")
    add("--batch", type=positive, default=1)
    add("--dtype", choices=sorted(DTYPES), default="float32")
    add("--calls", type=positive, help="calls per contestant and round; default: 1, on cuda 10")
    return parser


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    timing.keep_freed_memory(args.device)
    print(ops.build_info())
    args.calls = args.calls or (10 if args.device == "cuda" else 1)
    rows = []
    for shape in args.shapes:
        for pattern in args.patterns:
            for row in rows_of(args, shape, pattern):
                print(timing.as_line({"shape": shape, "pattern": pattern, **row}))
                rows.append({**setting(args, shape, pattern), **row})
    timing.save(args, rows)


def rows_of(args: argparse.Namespace, shape: str, pattern: str) -> list[dict]:
    inputs = op_inputs(SHAPES[shape], args.batch, pattern, DTYPES[args.dtype], args.device)
    return measure_op(inputs, args.contestants, args.rounds, args.device, args.from_logits, args.calls)


def setting(args: argparse.Namespace, shape: str, pattern: str) -> dict:
    """The columns that name the setting."""
    options = {"batch": args.batch, "dtype": args.dtype, "from_logits": args.from_logits, "calls": args.calls}
    return {"shape": shape, "pattern": pattern, **options}


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
