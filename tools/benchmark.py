#!/usr/bin/env python3
"""Measures speed; each subcommand measures one thing and writes a CSV that names the versions and the machine.

    python tools/benchmark.py op --threads 2 --output output/op_cpu.csv

op: the deformable attention alone, against PyTorch's own operators and, where it is installed, torch-ms-deform-attn.
All contestants take turns within each round, so that a busy machine slows them alike. The times are medians over the
rounds: wall time, and on a CPU also the CPU time of the process, which neighbours disturb less.
"""

import argparse
import csv
import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eco_m2f import ops
from eco_m2f.files import atomic_write

LEVELS = {
    "A": [(32, 64), (64, 128), (128, 256)],  # a 1024 x 2048 image
    "B": [(25, 42), (50, 84), (100, 167)],  # an 800 x 1333 image
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class OpInputs:
    """Arguments of one call and the gradient that comes back."""

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    grad: Tensor


def op_inputs(shapes, batch: int, pattern: str, dtype: torch.dtype, device: str, heads=8, channels=32, points=4):
    """Random inputs with a query per token. "encoder": around the query's own position, as an untrained encoder looks
    (1 to `points` pixels along the head's direction, 1 pixel of noise); "uniform": anywhere, the worst case.
    """
    generator = torch.Generator().manual_seed(0)
    attention = ops.MSDeformAttn(heads * channels, len(shapes), heads, points)
    centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    centres = torch.cat(centres).flip(-1)  # [S, 2], (x, y)
    tokens, levels = len(centres), len(shapes)
    grid = (batch, tokens, heads, levels, points)
    if pattern == "uniform":
        locations = torch.rand(*grid, 2, generator=generator)
    else:
        offsets = attention.sampling_offsets.bias.detach().view(heads, levels, points, 2)
        offsets = offsets + torch.randn(*grid, 2, generator=generator)
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
        locations = centres[:, None, None, None] + offsets / sizes[:, None]
    weights = torch.randn(batch, tokens, heads, levels * points, generator=generator).softmax(-1).view(grid)
    value = torch.randn(batch, tokens, heads, channels, generator=generator)
    grad = torch.randn(batch, tokens, heads * channels, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value, weights, grad = (t.to(device, dtype) for t in (value, weights, grad))
    return OpInputs(value, shapes, locations.to(device, wide), weights, grad)


def op_contestants(inputs: OpInputs, names: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> function of (value, locations, weights); torch-ms-deform-attn only where it can be imported."""
    shapes, flat = inputs.shapes, [size for shape in inputs.shapes for size in shape]
    table = {
        "eco_m2f": lambda value, locations, weights: ops.ms_deform_attn(value, shapes, locations, weights),
        "embedding_bag": lambda *t: ops.reference_ms_deform_attn(t[0], flat, t[1], t[2]),
        "grid_sample": lambda *t: ops.grid_sample_ms_deform_attn(t[0], flat, t[1], t[2]),
    }
    if importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn as rival

        sizes = torch.tensor(shapes, device=inputs.value.device)
        areas = [h * w for h, w in shapes]
        starts = torch.tensor([sum(areas[:i]) for i in range(len(areas))], device=inputs.value.device)
        table["torch-ms-deform-attn"] = lambda *t: rival(t[0], sizes, starts, t[1].to(t[2].dtype), t[2])
    unknown = set(names) - set(table)
    if unknown:
        raise SystemExit(f"no contestant {sorted(unknown)}: choose from {sorted(table)}, or install it")
    return {name: table[name] for name in names or table}


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """(wall, CPU) milliseconds of one call; the device has finished before and after."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), float("nan")
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def measure_op(inputs: OpInputs, names: list[str], rounds: int, device: str) -> list[dict]:
    """One row per contestant: medians of the forward, and of the forward with its backward."""
    contestants = op_contestants(inputs, names)
    leaves = [t.clone().requires_grad_() for t in (inputs.value, inputs.locations, inputs.weights)]

    def both(function):
        torch.autograd.grad(function(*leaves), leaves, inputs.grad)

    samples = {name: ([], []) for name in contestants}
    for turn in range(rounds + 1):  # turn 0 warms up
        for name, function in contestants.items():
            with torch.no_grad():
                forward = timed(lambda: function(*leaves), device)
            backward = timed(lambda: both(function), device)
            if turn:
                samples[name][0].append(forward)
                samples[name][1].append(backward)
    return [{"contestant": name, **medians(*pair)} for name, pair in samples.items()]


def medians(forward: list[tuple[float, float]], both: list[tuple[float, float]]) -> dict[str, str]:
    """Column -> median over the rounds, in milliseconds."""
    columns = {}
    for kind, samples in (("forward", forward), ("forward_backward", both)):
        for clock, values in zip(("wall_ms", "cpu_ms"), zip(*samples)):
            columns[f"{kind}_{clock}"] = f"{statistics.median(values):.3f}"
    return columns


def machine(device: str) -> dict[str, str]:
    """What a number means nothing without."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"machine": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit or "unknown"}


def write_csv(path: Path, rows: list[dict]) -> None:
    """All rows share the first one's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run_op(args: argparse.Namespace) -> None:
    """The subcommand `op`."""
    print(ops.build_info())
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        for pattern in args.patterns:
            inputs = op_inputs(LEVELS[shape], args.batch, pattern, DTYPES[args.dtype], args.device)
            setting = {"shape": shape, "batch": args.batch, "pattern": pattern, "dtype": args.dtype}
            setting |= {"device": args.device, "threads": torch.get_num_threads(), "rounds": args.rounds}
            for row in measure_op(inputs, args.contestants, args.rounds, args.device):
                rows.append({**setting, **row, **machine(args.device)})
                print(", ".join(f"{key} {value}" for key, value in {"shape": shape, "pattern": pattern, **row}.items()))
    if args.output:
        write_csv(args.output, rows)


def add_op_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=sorted(LEVELS), default=["A"], help="A 1024x2048, B 800x1333")
    parser.add_argument("--patterns", nargs="+", choices=("encoder", "uniform"), default=["encoder", "uniform"])
    parser.add_argument("--contestants", nargs="+", default=[], help="default: all that can be imported")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.set_defaults(run=run_op)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(required=True, metavar="what")
    add_op_arguments(subcommands.add_parser("op", help="the deformable attention alone"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
