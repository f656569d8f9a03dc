"""setup.py's decision what to build, and the independence of the built library. Nothing is compiled here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import cpu_sampler

from eco_m2f.ops import build_info, compiled_backends
from eco_m2f.ops.extension import extension_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NO_TOOLKIT = "/nonexistent/cuda"


def decide(mode: str | None, **environment: str) -> subprocess.CompletedProcess:
    """Runs setup.py up to its decision, with a command that builds nothing."""
    clean = {k: v for k, v in os.environ.items() if k not in ("ECO_M2F_BUILD", "CUDA_HOME", "CUDA_PATH")}
    clean |= environment | ({"ECO_M2F_BUILD": mode} if mode else {})
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)


def test_none_builds_nothing():
    done = decide("none", CUDA_HOME=NO_TOOLKIT)
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stdout


def test_cuda_fails_where_it_cannot_be_built():
    """With the reason that auto gives when it leaves CUDA out."""
    done = decide("cuda", CUDA_HOME=NO_TOOLKIT)
    why = f"no bin/nvcc of a CUDA toolkit (CUDA_HOME is {NO_TOOLKIT})" if torch.version.cuda else "has no CUDA"
    assert done.returncode == 1 and why in done.stderr
    assert "ECO_M2F_BUILD=cuda is impossible" in done.stderr and "ECO_M2F_BUILD=cpu" in done.stderr


def test_unknown_modes_are_refused():
    done = decide("gpu")
    assert done.returncode == 1 and "ECO_M2F_BUILD is 'gpu': set it to auto, cpu, cuda or none" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_toolkit_is_found_behind_a_wrapper_of_nvcc(tmp_path):
    """Some machines have a script on PATH, in a folder that is no toolkit."""
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("nvcc is not installed")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    done = decide("cuda", PATH=f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "and the CUDA kernels" in done.stdout


def test_library_without_a_gpu():
    """It loads where PyTorch sees no GPU, and needs no library that PyTorch does not bring."""
    if extension_path() is None:
        pytest.skip("nothing was built")
    code = (
        "import eco_m2f.ops as ops, re; print(ops.compiled_backends());"
        "print({m for m in re.findall(r'\\S*cudart\\S*', open('/proc/self/maps').read())})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cpu" in done.stdout.splitlines()[0]
    libraries = re.findall(r"'(/\S+?)'", done.stdout.splitlines()[1])
    assert all("site-packages" in library for library in libraries), libraries


def test_library_of_another_pytorch_is_named(tmp_path):
    """A library that cannot be loaded is an error with a remedy, not a silent fallback."""
    shutil.copytree(
        ROOT / "eco_m2f", tmp_path / "eco_m2f", ignore=shutil.ignore_patterns("*.so", "csrc", "__pycache__")
    )
    (tmp_path / "eco_m2f" / "ops" / "_C.so").write_bytes(b"not a library")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("ECO_M2F_DISABLE_EXTENSION", None)
    command = [sys.executable, "-c", "import eco_m2f.ops"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "was not built for the installed PyTorch" in done.stderr and "ECO_M2F_DISABLE_EXTENSION=1" in done.stderr


def test_build_info_tells_how_to_get_what_is_missing():
    assert ("to build what is missing" in build_info()) == (len(compiled_backends()) < 2)


@pytest.mark.skipif("cpu" in compiled_backends(), reason="the CPU kernels are built")
def test_forcing_an_instruction_set_needs_the_kernels():
    with pytest.raises(RuntimeError, match="no CPU kernels are loaded"), cpu_sampler("avx2"):
        pass
