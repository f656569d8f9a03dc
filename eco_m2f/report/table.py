"""The table of a run, as Markdown and CSV, and what its numbers were made with."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from ..derived.dataset import DerivedDataset
from ..files import write_csv
from ..gates.mixture import Gain
from .results import Result


def markdown(results: Sequence[Result], kind: type) -> list[str]:
    """The table's lines, of a quality. "of full" is the part of the encoder's cost at the last exit.

    A mixture sends images to fixed exits at random. A gain over it at equal cost has its 95 % interval and p value.
    """
    quality = (*kind.columns.values(), *kind.evaluated_columns.values())
    head = ("model", "images leave", *quality, "mean exit", "GFLOPs", "encoder GFLOPs", "of full", "images per exit")
    head += ("gain over the mixture",)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    full = max(result.row.encoder_gflops for result in results)
    for result in results:
        row, numbers = result.row, result.row.numbers()
        points = [numbers[c] for c in kind.columns] + [result.evaluated.get(c) for c in kind.evaluated_columns]
        cells = [result.model, result.leaves, *("" if v is None else f"{v:.2f}" for v in points)]
        cells += [f"{row.mean_exit:.2f}", f"{row.total_gflops:.4g}", f"{row.encoder_gflops:.4g}"]
        cells += [f"{100 * row.encoder_gflops / full:.0f} %", " ".join(f"{k}:{n}" for k, n in row.images.items() if n)]
        cells.append(_gain(row.gain))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gain(gain: Gain | None) -> str:
    return f"{gain.gain:+.2f} ({gain.low:.2f} to {gain.high:.2f}), p {gain.p:.3f}" if gain else ""


def provenance(folder: Path, parent: DerivedDataset, val: DerivedDataset) -> list[str]:
    """Lines that say what the numbers were made with: data, weights, commands, times, machine."""
    about = val.provenance
    lines = [
        f"{val.quality_name} on the {len(val)} images of `{about['dataset']}`; GFLOPs: means over them, in the paper's "
        "convention. A mixture sends images to fixed exits at random, at the mean GFLOPs of a gate. A gain over it has "
        "its 95 % interval and the p value of no gain, from resampled images.",
        "",
        f"Parent {parent.provenance['checkpoint_sha256'][:12]}, after Step A {about['checkpoint_sha256'][:12]}; "
        f"eco_m2f {__version__}, torch {torch.__version__}, {_threads()} on {_processor()}.",
    ]
    stages = folder / "stages.json"
    if stages.exists():
        done = json.loads(stages.read_text())
        total = sum(stage["seconds"] for stage in done.values()) / 60
        lines += ["", f"Stages, {total:.1f} minutes in all:", ""]
        lines += [
            f"- {name}, {stage['seconds']:.0f} s: `{_portable(stage['command'])}`" for name, stage in done.items()
        ]
    return lines


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread{'s' if number > 1 else ''}"


def _portable(command: str) -> str:
    """A command with paths relative to the working directory."""
    return command.replace(f"{os.getcwd()}/", "")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_table(results: Sequence[Result], path: Path) -> None:
    columns = dict.fromkeys(name for r in results for name in r.evaluated)  # all have them, or are empty there
    rows = [{"model": r.model, "leaves": r.leaves, **r.row.numbers(), **columns, **r.evaluated} for r in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, rows, names)
