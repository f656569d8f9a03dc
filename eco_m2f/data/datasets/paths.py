"""Where the files of datasets lie: the root, paths that users write, and the file names that a JSON holds."""

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
    raise DataError(f"{os.path.abspath(path)}: {kind} JSON not found, written as {written!r}; {RULE}; {hint}")


def inside(root: str | Path, name: str, outside: bool = False) -> str:
    """The path of a file that a JSON names below a root.

    Raises DataError where `..` or an absolute path leads out of the root, unless `outside` is allowed. Symbolic links
    are followed wherever they lead: whoever can make them can read what they point to.
    """
    path = os.path.join(root, name)
    base = os.path.abspath(root)
    if outside or os.path.abspath(path).startswith(base.rstrip(os.sep) + os.sep):
        return str(Path(path))
    raise DataError(
        f"file name {name!r} leads out of {base}: correct it, or write outside=allowed into the DATASETS.CUSTOM entry "
        "where this is meant"
    )
