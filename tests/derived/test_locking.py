"""One run at a time in a folder."""

import os
import signal

import pytest
from other_run import other_run

from eco_m2f.derived import locking
from eco_m2f.derived.locking import LOCK, locked_folder


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with other_run(tmp_path) as first:
        with pytest.raises(ValueError, match=f"process {first.pid} on .* is at work in .*{tmp_path.name}: wait"):
            with locked_folder(tmp_path):
                pass
        assert (tmp_path / LOCK).exists()
        first.communicate("")
    with locked_folder(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_is_gone(tmp_path):
    with other_run(tmp_path) as first:
        os.kill(first.pid, signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with locked_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_forked_does_not_hold_its_lock(tmp_path):
    with locked_folder(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with other_run(tmp_path) as second:
            second.communicate("")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Otherwise two runs could lock two files of the same name."""
    original, calls = locking.fcntl.lockf, []

    def lockf(file, operation):
        original(file, operation)
        if not calls:
            (tmp_path / LOCK).unlink()  # by the previous run, which ends now
        calls.append(operation)

    monkeypatch.setattr(locking.fcntl, "lockf", lockf)
    with locked_folder(tmp_path):
        assert len(calls) == 2 and f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()


def test_without_locks_it_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def lockf(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locking.fcntl, "lockf", lockf)
    with locked_folder(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert "cannot be locked (Function not implemented)" in caplog.text
