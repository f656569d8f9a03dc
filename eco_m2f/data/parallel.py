"""One function over many files, with a progress bar and, if asked, several processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm


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
