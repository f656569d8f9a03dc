"""Runs a benchmark in the test's process, and reads its CSV."""

import csv
from pathlib import Path
from types import ModuleType

from eco_m2f.engine.command_line import run


def status_of(tool: ModuleType, *arguments) -> int:
    """The exit status of the benchmark with these arguments."""
    return run(tool.main, tool.build_parser().parse_args([*map(str, arguments)]))


def rows_of(tool: ModuleType, target: Path, *arguments) -> list[dict]:
    """The rows of the CSV that the benchmark writes."""
    assert status_of(tool, *arguments, "--output", target) == 0
    with open(target) as file:
        return list(csv.DictReader(file))
