"""Jobs run in worker processes while the main process continues."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from minis import ROOT
from tiny import is_running, tool_environment

from eco_m2f.data import parallel
from eco_m2f.data.parallel import map_in_workers

pytestmark = pytest.mark.slow


def work(folder: Path, job: int) -> tuple[int, int]:
    """Later jobs are faster than earlier ones. It records which are done."""
    if job == 13:
        raise ValueError("job 13 brings bad luck")
    time.sleep(0.02 * (job % 3 == 0))
    (folder / str(job)).touch()
    return job * job, os.getpid()


def die(job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_jobs(tmp_path, workers):
    results = list(map_in_workers(partial(work, tmp_path), range(12), workers))
    assert [square for square, _ in results] == [i * i for i in range(12)]
    assert ({pid for _, pid in results} == {os.getpid()}) == (workers == 0)


def test_jobs_are_made_only_so_far_ahead(tmp_path, monkeypatch):
    """The first job fails after its worker has started. Until then any number of jobs could be made."""
    monkeypatch.setattr(parallel, "AHEAD", 2**20)
    made = []

    def jobs():
        for i in range(13, 1000):
            made.append(i)
            yield Large(i, bytes(2**17))

    with pytest.raises(ValueError, match="job 13 brings bad luck"):
        list(map_in_workers(partial(work, tmp_path), jobs(), 1))
    assert 1 <= len(made) <= 8
    assert len(list(tmp_path.iterdir())) < 8  # jobs that had not started were dropped


class Large(int):
    """A number that takes memory."""

    def __new__(cls, value: int, weight: bytes):
        number = super().__new__(cls, value)
        number.weight = weight
        return number

    def __reduce__(self):
        return Large, (int(self), self.weight)


def test_tensors_cross_by_value():
    tensors = [torch.full((2, 3), float(i)) for i in range(3)]
    assert [t.sum().item() for t in map_in_workers(torch.neg, tensors, 1)] == [0.0, -6.0, -12.0]


def test_a_worker_that_dies_ends_the_job():
    with pytest.raises(ChildProcessError, match=r"worker process died \(out of memory\?\): run the same command again"):
        list(map_in_workers(die, range(3), 2))


ENDLESS = """
import itertools, os, signal, time
from eco_m2f.data.parallel import map_in_workers

def born(job):
    time.sleep(0.02)
    return os.getpid()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    for pid in map_in_workers(born, itertools.count(), 2):
        print(pid, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, kind):
    """The parent is killed, or gets Ctrl-C. A terminal sends that to the whole group; only the parent handles it."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(script)], env=tool_environment(PYTHONPATH=str(ROOT)), text=True, process_group=0,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    workers = set()
    while len(workers) < 2:
        workers.add(int(process.stdout.readline()))
    assert all(is_running(pid) for pid in workers) and process.pid not in workers
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)  # this also waits for the workers, which hold the pipes
    assert process.returncode == -kind
    assert not any(is_running(pid) for pid in workers)
    assert errors.count("Traceback") == (kind == signal.SIGINT), errors
