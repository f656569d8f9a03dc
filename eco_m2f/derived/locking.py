"""Locks a folder for one run."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
LOCK = ".lock"


@contextmanager
def locked_folder(directory: str | os.PathLike) -> Iterator[None]:
    """Makes a folder and locks it for this process until the block or the process ends.

    It is a lock of the operating system on the file `.lock`. So there is nothing to clean up after a kill, and forked
    processes do not hold it. It works between machines if their file system has such locks, as NFS 4 does. If there
    are no locks, it logs a warning.

    Raises:
        ValueError: another process has locked the folder; the message names it.
    """
    path = Path(directory) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path) -> IO:
    """The lock file, open and locked."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{owner} is at work in {path.parent}: wait until it has ended, or choose another folder"
                ) from error
            logger.warning("%s cannot be locked (%s): start no second run there", path.parent, error.strerror)
            return open(os.devnull)
        if _is_still_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # the previous run has removed it in the meantime


def _is_still_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
