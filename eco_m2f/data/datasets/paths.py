"""Where datasets lie: the root folder, and the paths that users write."""

import os
import string
from pathlib import Path

from ..images import DataError

ROOT = "DETECTRON2_DATASETS"
RULE = f"relative paths lie under ${ROOT} (./datasets if unset)"


def datasets_root() -> Path:
    """$DETECTRON2_DATASETS, or ./datasets if it is unset."""
    return Path(os.path.expanduser(os.environ.get(ROOT, "datasets")))


def resolve(path: str) -> str:
    """Replaces ~ and $VARIABLES in a path that a user wrote. A relative path lies under `datasets_root()`.

    Raises ValueError if a variable is not set.
    """
    template = string.Template(path)
    values = {**os.environ, ROOT: os.path.abspath(datasets_root())}
    unset = [name for name in template.get_identifiers() if name not in values]
    if unset:
        raise ValueError(f"path {path!r}: the environment variable {unset[0]} is not set. Set it, or write its value")
    return str(datasets_root() / os.path.expanduser(template.safe_substitute(values)))


def check_there(path: str, written: str, kind: str) -> None:
    """Raises DataError if there is no JSON at `path`.

    written: the path as the user wrote it. If it exists in the working directory, the message says so.
    """
    if os.path.exists(path):
        return
    hint = "correct the path, or make the file as datasets/README.md shows"
    if os.path.exists(written):
        hint = f"there is one in the working directory: write {os.path.abspath(written)}"
    raise DataError(
        f"{os.path.abspath(path)}: {kind} JSON not found, written as {written!r}; {RULE}; {hint}"
    ) from FileNotFoundError(path)
