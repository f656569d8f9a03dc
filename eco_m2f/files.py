"""Writes files whole or not at all, opens them safely, and computes their digests."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a file for writing. It gets its name when the block has ended and its bytes are on the disk.

    Until then, and if the block raises, an older file of that name is unchanged.

    Raises:
        OSError: the folder is missing, the disk is full, and so on.
    """
    path = Path(path)
    # It is in the same folder, because renaming is atomic only within a file system. The suffix shows that a leftover
    # of a killed process is no result. The lock shows that a file in use is no leftover.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, mode) as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk, so that a renaming survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike, name: str = "*") -> None:
    """Removes the unfinished files of `atomic_write` that killed processes left in a folder. Files in use stay.

    name: the final name of the file; by default any. The lock shows which files are in use. A process number would
    not, because it may belong to another machine or a new process.
    """
    for path in Path(folder).glob(f".{name}.*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to read its bytes. Raises OSError if it is no regular file: a pipe or /dev/zero never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")
    return open(path, "rb")


def prepare_output(path: str | os.PathLike) -> None:
    """Makes the folder of a file that will be written. Called early, it finds a wrong path before the work.

    Raises:
        ValueError: the folder cannot be made or written to, or the path itself is a folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError("it is a folder" if path.is_dir() else "its folder is write-protected")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): choose another file") from error


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> None:
    """Makes the folder and writes rows with a header, whole or not at all. columns: by default the first row's.

    Raises:
        ValueError: a row has another column.
    """
    prepare_output(path)
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if columns is None else columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def file_sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
