"""The common part of the benchmarks: clocks, rounds, options, and a CSV with the versions and the machine.

The contestants take turns within each round, so a busy machine slows all of them. Times are medians over the rounds:
wall time, and on a CPU also the CPU time of the process, which other processes disturb less. A ratio is the median of
the rounds' quotients, contestant over eco_m2f. Above 1, eco_m2f is faster.
"""

import argparse
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from eco_m2f.engine import command_line
from eco_m2f.files import prepare_output, write_csv

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "eco_m2f"


def timed(function: Callable[[], object], device: str, calls: int = 1) -> tuple[float, float]:
    """(wall, CPU) milliseconds per call. The device is idle before and after the calls."""
    if device == "cuda":
        return _timed_on_gpu(function, calls), math.nan
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - wall) / calls, 1e3 * (time.process_time() - cpu) / calls


def _timed_on_gpu(function: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def take_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str, repeat: int = 1) -> dict[str, list]:
    """Name -> the (wall, CPU) milliseconds of each round. One more round warms up."""
    samples = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            times = timed(call, device, repeat)
            if turn:
                samples[name].append(times)
    return samples


def median_ratio(own: list, ours: list) -> float:
    """The median of the rounds' quotients of wall time."""
    return statistics.median(a[0] / b[0] for a, b in zip(own, ours))


@torch.no_grad()
def measure(contestants: dict[str, Callable[[], object]], rounds: int, device: str) -> list[dict]:
    """One row per contestant: medians over the rounds, and the median ratio to the first contestant."""
    samples = take_turns(contestants, rounds, device)
    ours = samples[next(iter(samples))]
    rows = []
    for name, own in samples.items():
        wall, cpu = (statistics.median(times[i] for times in own) for i in range(2))
        ratio = f"{median_ratio(own, ours):.2f}"
        rows.append({"contestant": name, "wall_ms": f"{wall:.3f}", "cpu_ms": f"{cpu:.3f}", "ratio": ratio})
    return rows


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def argument_parser(description: str, rounds: int, with_device: bool = True) -> argparse.ArgumentParser:
    """The options of all benchmarks. Without a device they run on the CPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if with_device:
        add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    add("--rounds", type=positive, default=rounds, help=f"rounds after one that warms up; default: {rounds}")
    add("--output", type=Path, help="CSV file to write")
    parser.set_defaults(device="cpu")
    return parser


def add_model_options(parser: argparse.ArgumentParser, kind: str, size: Sequence[int]) -> None:
    """The config of a model of this kind, and the size of its images."""
    parser.add_argument("--config-file", required=True, help=f"config of {kind}")
    parser.add_argument("--size", type=positive, nargs=2, default=size, metavar=("H", "W"), help="image size in pixels")


def prepare(args: argparse.Namespace) -> None:
    """Sets the threads. Raises ValueError if the device is missing or the output cannot be written."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here (nvidia-smi); take --device cpu")
    if args.output:
        prepare_output(args.output)
    use_threads(args.threads)


def use_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def keep_freed_memory(device: str) -> None:
    """On a CPU, as the tools do."""
    if device == "cpu":
        command_line.keep_freed_memory()


def model_setting(args: argparse.Namespace) -> dict:
    """The columns that name the model and the size of its images."""
    return {"config": args.config_file, "height": args.size[0], "width": args.size[1]}


def machine(device: str) -> dict[str, str]:
    """The machine and the versions behind the numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit or "unknown"}
    return {"machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(), **versions}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_line(row: dict) -> str:
    """A row as text."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """Writes the rows, with the settings of the run, to --output if it is given."""
    about = {"threads": torch.get_num_threads(), "rounds": args.rounds, "device": args.device, **machine(args.device)}
    if args.output:
        write_csv(args.output, [{**row, **about} for row in rows])
