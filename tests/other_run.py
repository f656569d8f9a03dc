"""A process that holds the lock of a folder."""

import subprocess
import sys
from pathlib import Path

from eco_m2f.derived import locking

# A process that needs neither torch nor detectron2, so that it starts at once.
HOLD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("locking", {locking.__file__!r})
locking = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locking)
with locking.locked_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def other_run(folder: Path) -> subprocess.Popen:
    """Another process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process
