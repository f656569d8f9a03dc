"""Lint, format of Python and C++, and types of the modules that pyproject.toml lists for mypy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}


def assert_passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`make format` mends what is lint or format"


def tool(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    found = str(path) if path.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed; constraints.txt has its version")
    return found


def test_lint():
    assert_passes(tool("ruff"), "check", "--quiet", ".")


def test_python_format():
    assert_passes(tool("ruff"), "format", "--check", "--quiet", "--diff", ".")


def test_cpp_format():
    sources = [str(p) for p in sorted((ROOT / "eco_m2f").rglob("*")) if p.suffix in SUFFIXES]
    assert sources, "no C++ sources found"
    assert_passes(tool("clang-format"), "--dry-run", "-Werror", *sources)


def test_types():
    assert_passes(tool("mypy"))
