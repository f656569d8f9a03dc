"""setup.py's decision what to build, and the independence of the built library. Nothing is compiled here."""

import json
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


# A process in which setup.py runs several times, each in a fork of it: PyTorch is imported once.
FORKS = """
import json, os, runpy, sys
import setuptools, torch  # all that setup.py takes from it is imported in the forks

for name, environment in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{sys.argv[2]}/{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
        os.environ |= environment
        sys.argv[:] = ["setup.py", "--quiet", "--version"]
        sys.path.insert(0, os.getcwd())
        runpy.run_path("setup.py", run_name="__main__")
        break
    open(f"{sys.argv[2]}/{name}.status", "w").write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope="module")
def decisions(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """{case: setup.py as far as its decision}: a command that builds nothing."""
    folder = tmp_path_factory.mktemp("decisions")
    cases = {
        "none": {"ECO_M2F_BUILD": "none", "CUDA_HOME": NO_TOOLKIT},
        "cuda": {"ECO_M2F_BUILD": "cuda", "CUDA_HOME": NO_TOOLKIT},
        "unknown": {"ECO_M2F_BUILD": "gpu"},
        "wrapper": {"ECO_M2F_BUILD": "cuda", "PATH": f"{wrapper_of_nvcc(folder)}{os.pathsep}{os.environ['PATH']}"},
    }
    clean = {k: v for k, v in os.environ.items() if k not in ("ECO_M2F_BUILD", "CUDA_HOME", "CUDA_PATH")}
    command = [sys.executable, "-c", FORKS, json.dumps(cases), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = lambda name, part: (folder / f"{name}.{part}").read_text()  # noqa: E731
    return {
        name: subprocess.CompletedProcess([], int(read(name, "status")), read(name, "stdout"), read(name, "stderr"))
        for name in cases
    }


def wrapper_of_nvcc(folder: Path) -> Path:
    """A folder with a script on behalf of the nvcc on PATH, as some machines have it, where there is one."""
    bin_folder, real = folder / "bin", shutil.which("nvcc")
    bin_folder.mkdir()
    if real is not None:
        (bin_folder / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        (bin_folder / "nvcc").chmod(0o755)
    return bin_folder


def test_none_builds_nothing(decisions):
    done = decisions["none"]
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stdout


def test_cuda_fails_where_it_cannot_be_built(decisions):
    """With the reason that auto gives when it leaves CUDA out."""
    done = decisions["cuda"]
    why = f"no bin/nvcc of a CUDA toolkit (CUDA_HOME is {NO_TOOLKIT})" if torch.version.cuda else "has no CUDA"
    assert done.returncode == 1 and why in done.stderr
    assert "ECO_M2F_BUILD=cuda is impossible" in done.stderr and "ECO_M2F_BUILD=cpu" in done.stderr


def test_unknown_modes_are_refused(decisions):
    done = decisions["unknown"]
    assert done.returncode == 1 and "ECO_M2F_BUILD is 'gpu': set it to auto, cpu, cuda or none" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_toolkit_is_found_behind_a_wrapper_of_nvcc(decisions):
    """Some machines have a script on PATH, in a folder that is no toolkit."""
    done = decisions["wrapper"]
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


def test_the_cpp_standard_is_left_to_pytorch():
    """Later versions of its headers need C++20, and a standard of our own would take precedence."""
    assert "-std" not in (ROOT / "setup.py").read_text()
