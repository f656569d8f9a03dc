"""One function over many jobs, in order, in other processes if asked."""

import collections
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

AHEAD = 2**28  # bytes of jobs under way, beyond which the first of them must be done
MANY = 1024  # and what bounds the work of calling them off


def each(function: Callable, jobs: Sequence, workers: int, title: str) -> Iterator:
    """Yields function(job) for each job, in order; workers below 2 stay in this process. The first error ends it."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    bar = {"total": len(jobs), "desc": title, "unit": "image", "disable": None}  # None: only on a terminal
    if workers == 1:
        yield from tqdm(map(function, jobs), **bar)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from tqdm(pool.map(function, jobs, chunksize=8), **bar)
        except BaseException:  # nobody will read the rest: do not compute it
            pool.shutdown(cancel_futures=True)
            raise


def map_in_workers(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """Yields function(job) for each job, in order, while this process makes the jobs that come next.

    The workers are new interpreters, safe beside threads and CUDA; jobs and results cross by pickle. With 0 workers
    everything happens here. No more than `AHEAD` bytes of jobs, and one job, are under way, nor `MANY` jobs. Workers
    leave Ctrl-C to this process and end with it, also when it is killed. An error of the function is raised here, at
    its job; ChildProcessError where a worker died.
    """
    if workers == 0:
        yield from map(function, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_end_with, initargs=(os.getpid(),))
    waiting, ahead = collections.deque(), 0
    try:
        for _ in range(workers):  # they take seconds to start
            _submit(pool, os.getpid)
        for job in jobs:
            task = pickle.dumps((function, job), pickle.HIGHEST_PROTOCOL)
            waiting.append((_submit(pool, _call, task), len(task)))
            ahead += len(task)
            while waiting and (ahead > AHEAD or len(waiting) >= MANY or waiting[0][0].done()):
                future, size = waiting.popleft()
                ahead -= size
                yield future.result()
        for future, _ in waiting:
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died (out of memory?): run the same command again, with fewer workers if it happens again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable, *args) -> Future:
    """A worker starts in this call where one is missing, and inherits that it gets no SIGINT."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _call(task: bytes):
    """Pickled by hand and not by the pool, which would hand tensors over as open files."""
    function, job = pickle.loads(task)
    return function(job)


def _end_with(parent: int) -> None:
    """Makes this process end at most a second after its parent, however that one ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
