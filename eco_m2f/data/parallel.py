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

AHEAD = 2**28  # bytes of submitted jobs; above this the caller waits for the first of them
MANY = 1024  # number of submitted jobs; bounds the work of cancelling them


def each(function: Callable, jobs: Sequence, workers: int, title: str) -> Iterator:
    """Yields function(job) for each job, in order. One worker means this process. The first error ends it."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    bar = {"total": len(jobs), "desc": title, "unit": "image", "disable": None}  # None: only on a terminal
    if workers == 1:
        yield from tqdm(map(function, jobs), **bar)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from tqdm(pool.map(function, jobs, chunksize=8), **bar)
        except BaseException:  # the rest is not read, so do not compute it
            pool.shutdown(cancel_futures=True)
            raise


def map_in_workers(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """Yields function(job) for each job, in order, while this process makes the next jobs.

    The workers are new interpreters, because forks are not safe with threads and CUDA. Jobs and results are pickled.
    With 0 workers everything runs in this process. At most `AHEAD` bytes of jobs, plus one job, and `MANY` jobs are
    submitted at a time. Workers ignore Ctrl-C and end with this process, also if it is killed. An error of the function
    is raised at its job. Raises ChildProcessError if a worker died.
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
    """Submits with SIGINT blocked, because a worker that starts in this call inherits this."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _call(task: bytes):
    """Calls a pickled (function, job). The pool's own pickling would pass tensors as open files."""
    function, job = pickle.loads(task)
    return function(job)


def _end_with(parent: int) -> None:
    """Makes this process end at most a second after its parent, however the parent ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
