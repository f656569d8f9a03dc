"""A folder that one run has to itself."""

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
    """Keeps a folder, which is made, to this process until the block ends or the process does, however it does.

    The lock is one of the system's on the file `.lock`, so nothing has to be cleaned up after a kill, and processes
    that this one has forked do not hold it. It holds between machines where their file system has such locks (NFS 4
    does); where there are none, a warning says so.

    Raises:
        ValueError: another process has the folder; the message tells which.
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
                    f"{owner} is at work in {path.parent}: wait until it has ended, or name another folder"
                ) from error
            logger.warning("%s cannot be locked (%s): see that no second run works there", path.parent, error.strerror)
            return open(os.devnull)
        if _is_still_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # the run before has removed it in between


def _is_still_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
