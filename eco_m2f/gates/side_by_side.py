"""Several L-BFGS minimisations at once, evaluated together, so that gates share each pass over the features.

A gate took 0.5 s this way and 2.2 s one after the other, on 118,287 images of 2048 features (docs/results/steps.md).
Threads are needed because scipy's L-BFGS calls its objective itself and cannot be run step by step.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.optimize import minimize


def minimise_side_by_side(objectives: Callable, starts: Sequence[np.ndarray], options: dict) -> list:
    """scipy's result of L-BFGS-B for each start; the evaluations are made together.

    objectives({index: point}) -> {index: (value, gradient)}. Each minimisation has a thread, which hands in a point and
    waits. Once every running thread has handed in a point, all points are evaluated at once. Points are passed in the
    order of their indices, so the order of the threads does not matter. An error of objectives ends all minimisations.
    """
    exchange = _Exchange(len(starts))
    for index, start in enumerate(starts):
        threading.Thread(target=_minimise_one, args=(exchange, index, start, options), daemon=True).start()
    results = _evaluate_all(objectives, exchange)
    return [results[i] for i in range(len(starts))]


class _Exchange:
    """Queues between the threads and the evaluation: points go one way, values and gradients the other."""

    def __init__(self, count: int):
        self.handed_in: queue.Queue = queue.Queue()  # (index, point, None), or (index, None, result) at the end
        self.answers = [queue.SimpleQueue() for _ in range(count)]  # (value, gradient), or None to give up

    def ask(self, index: int, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at a point. Blocks its thread until they are there."""
        self.handed_in.put((index, point.copy(), None))
        answer = self.answers[index].get()
        if answer is None:
            raise _Abandoned
        return answer


class _Abandoned(Exception):
    """Ends a minimisation whose evaluation failed."""


def _minimise_one(exchange: _Exchange, index: int, start: np.ndarray, options: dict) -> None:
    result = None
    try:
        result = minimize(partial(exchange.ask, index), start, jac=True, method="L-BFGS-B", options=options)
    except _Abandoned:
        pass
    finally:
        exchange.handed_in.put((index, None, result))


def _evaluate_all(objectives: Callable, exchange: _Exchange) -> dict:
    """Answers the threads until all have ended. Returns their results by index."""
    results, running, points = {}, set(range(len(exchange.answers))), {}
    try:
        while running:
            index, point, result = exchange.handed_in.get()
            if point is None:
                running.remove(index)
                results[index] = result
            else:
                points[index] = point
            if running and len(points) == len(running):
                evaluated = objectives(dict(sorted(points.items())))
                points = {}
                for i, answer in evaluated.items():
                    exchange.answers[i].put(answer)
    finally:
        for i in running:  # an evaluation failed: let no thread wait for ever
            exchange.answers[i].put(None)
    return results
