"""Where the files of datasets lie: the root, and paths that users write."""

import os
import string
from pathlib import Path

from ..images import DataError

ROOT = "DETECTRON2_DATASETS"
RULE = f"relative paths lie under ${ROOT} (./datasets if unset)"


def datasets_root() -> Path:
    """Where datasets lie: $DETECTRON2_DATASETS, or ./datasets."""
    return Path(os.path.expanduser(os.environ.get(ROOT, "datasets")))


def resolve(path: str) -> str:
    """A path that a user wrote: ~ and $VARIABLES are replaced, and a relative one lies under `datasets_root()`.

    Raises ValueError for a variable that is not set.
    """
    template = string.Template(path)
    values = {**os.environ, ROOT: os.path.abspath(datasets_root())}
    unset = [name for name in template.get_identifiers() if name not in values]
    if unset:
        raise ValueError(f"path {path!r}: the environment variable {unset[0]} is not set: set it, or write it out")
    return str(datasets_root() / os.path.expanduser(template.safe_substitute(values)))


def check_there(path: str, written: str, kind: str) -> None:
    """Raises DataError where no JSON is at a path that the user wrote so; it says whether the file is elsewhere."""
    if os.path.exists(path):
        return
    hint = "correct the path, or make the file as datasets/README.md tells"
    if os.path.exists(written):
        hint = f"there is one in the working directory: write {os.path.abspath(written)}"
    raise DataError(
        f"{os.path.abspath(path)}: {kind} JSON not found, written as {written!r}; {RULE}; {hint}"
    ) from FileNotFoundError(path)
