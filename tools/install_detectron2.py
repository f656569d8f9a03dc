#!/usr/bin/env python3
"""Installs detectron2 and panopticapi, which have no official release on the package index.

Usage: python tools/install_detectron2.py, with the Python that will import them. It must have torch already.

If detectron2 can be imported, it is kept. Otherwise it is built from source at a pinned commit of upstream. If upstream
cannot be reached, a wheel of the same commit comes from the package index. The wheel is for CPython 3.10, so its
compiled part does not load in other versions. eco_m2f does not need that part.
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
    """The installation failed. The message says what failed and what to do."""


def say(message: str) -> None:
    print(f"detectron2: {message}", flush=True)


def pip(*arguments: str) -> None:
    """Runs pip for this Python. Raises InstallError if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"this command failed, see its output above: {' '.join(command)}")


def imports(statement: str) -> bool:
    """Whether a new interpreter can run the statement. An import in this one could see stale files."""
    return subprocess.run([sys.executable, "-c", statement], capture_output=True).returncode == 0


def upstream_is_reachable() -> bool:
    command = ["git", "ls-remote", UPSTREAM, "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, timeout=REACH_TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):  # no git, or a network that drops packets
        return False


def check_sha256(path: Path, expected: str) -> None:
    """Raises InstallError if the file is not the one that this project was tested with."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{path.name} has sha256 {found}, expected {expected}: the package index served another file. "
            f"Nothing was installed. Build detectron2 yourself from {UPSTREAM} at {COMMIT}."
        )


def install_upstream() -> None:
    pip("install", "--no-build-isolation", "--no-deps", f"git+{UPSTREAM}@{COMMIT}")


def install_wheel() -> None:
    """Downloads the wheel for CPython 3.10, checks it, and unpacks it into this Python's packages."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "--dest", folder, WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        check_sha256(wheel, WHEEL_SHA256)
        # With --target pip installs a wheel with a foreign tag. --upgrade replaces a half-unpacked one.
        target = sysconfig.get_paths()["purelib"]
        pip("install", "--no-deps", "--upgrade", "--only-binary=:all:", *WHEEL_TAGS, "--target", target, str(wheel))


def install_detectron2() -> None:
    if upstream_is_reachable():
        say(f"building {UPSTREAM} at {COMMIT} from source (some minutes)")
        install_upstream()
    else:
        say(f"{UPSTREAM} cannot be reached; using {WHEEL}, a wheel of the same commit, from the package index")
        install_wheel()
    # Last, because the dependencies are of no use if detectron2 could not be installed.
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
        say("keeping the installed one")
    else:
        install_detectron2()
        if not imports(check):
            raise InstallError(f"it was installed but does not import; for the error run {sys.executable} -c '{check}'")
    if imports("import panopticapi.evaluation"):
        say("keeping the installed panopticapi")
    else:
        pip("install", "--no-deps", PANOPTICAPI)
    say("ready")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"detectron2: {error}")
