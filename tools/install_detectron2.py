#!/usr/bin/env python3
"""Installs detectron2 and panopticapi, neither of which has a release of its own on the package index.

Usage: python tools/install_detectron2.py, with the Python that is to import them and that has torch already.

A detectron2 that imports is kept. Otherwise upstream is built from source at a pinned commit where it can be reached;
where it cannot, a wheel of that same commit is taken from the package index. The wheel is tagged for CPython 3.10, so
its compiled part does not load elsewhere; nothing in eco_m2f needs that part.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

UPSTREAM = "https://github.com/facebookresearch/detectron2"
COMMIT = "a59f0563"  # of 2024-04-17
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WHEEL_TAGS = ["--python-version", "3.10", "--implementation", "cp"]
WHEEL_TAGS += ["--platform", "any", "--platform", "manylinux2014_x86_64"]
PANOPTICAPI = "panopticapi-lite==0.2.0"  # its numpy<2 is out of date: installed without its dependencies
DEPENDENCIES = """black cloudpickle fvcore hydra-core iopath matplotlib omegaconf packaging Pillow pycocotools
                  tabulate tensorboard termcolor tqdm yacs""".split()
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
REACH_TIMEOUT = 15  # seconds


class InstallError(Exception):
    """What could not be installed, and what to do about it."""


def say(message: str) -> None:
    print(f"detectron2: {message}", flush=True)


def pip(*arguments: str) -> None:
    """Run pip for this Python. Raises InstallError when pip fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"this command failed, see its output above: {' '.join(command)}")


def imports(statement: str) -> bool:
    """Whether a fresh interpreter runs the statement: an import in this one could see stale files."""
    return subprocess.run([sys.executable, "-c", statement], capture_output=True).returncode == 0


def upstream_is_reachable() -> bool:
    command = ["git", "ls-remote", UPSTREAM, "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, timeout=REACH_TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):  # no git, or a network that swallows packets
        return False


def check_sha256(path: Path, expected: str) -> None:
    """Raises InstallError where the file is not the one this project was tested with."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{path.name} has sha256 {found}, expected {expected}: the package index served another file. "
            f"Nothing was installed. Build detectron2 from {UPSTREAM} at {COMMIT} yourself instead."
        )


def install_upstream() -> None:
    pip("install", "--no-build-isolation", "--no-deps", f"git+{UPSTREAM}@{COMMIT}")


def install_wheel() -> None:
    """Fetch the wheel as for CPython 3.10, check it, and unpack it beside this Python's packages."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "--dest", folder, WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        check_sha256(wheel, WHEEL_SHA256)
        # --target is what lets pip install a wheel with a foreign tag; --upgrade replaces a half-unpacked one.
        target = sysconfig.get_paths()["purelib"]
        pip("install", "--no-deps", "--upgrade", "--only-binary=:all:", *WHEEL_TAGS, "--target", target, str(wheel))


def install_detectron2() -> None:
    if upstream_is_reachable():
        say(f"building {UPSTREAM} at {COMMIT} from source (some minutes)")
        install_upstream()
    else:
        say(f"{UPSTREAM} cannot be reached; taking {WHEEL}, a wheel of the same commit, from the package index")
        install_wheel()
    # Resolved only now: the dependencies of a detectron2 that never arrived would be of no use.
    pip("install", "--constraint", str(CONSTRAINTS), *DEPENDENCIES)


# This runs before the package is installed, so it has no command_line.run.
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            f"install torch first: {sys.executable} -m pip install -c {CONSTRAINTS.name} torch torchvision"
        )
    check = "import detectron2.config, detectron2.modeling, detectron2.evaluation"
    if imports(check):
        say("keeping the one that already imports")
    else:
        install_detectron2()
        if not imports(check):
            raise InstallError(f"it was installed but does not import; see: {sys.executable} -c '{check}'")
    if imports("import panopticapi.evaluation"):
        say("keeping the panopticapi that already imports")
    else:
        pip("install", "--no-deps", PANOPTICAPI)
    say("ready")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"detectron2: {error}")
