"""Several minimisations at once, which evaluate their objectives together."""

import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize


def minimise_side_by_side(objectives: Callable, starts: Sequence[np.ndarray], options: dict) -> list:
    """scipy's result of L-BFGS-B for every start, their evaluations being made together.

    objectives({index: point}) -> {index: (value, gradient)}. Each minimisation has a thread, which hands its point in
    and waits; when all that go on have handed theirs in, they are evaluated at once. Which thread comes first does not
    matter: points are taken in the order of their indices.
    """
    handed_in: queue.Queue = queue.Queue()
    answers = [queue.SimpleQueue() for _ in starts]

    def minimise_one(index: int) -> None:
        def ask(point: np.ndarray):
            handed_in.put((index, point.copy(), None))
            answer = answers[index].get()
            if answer is None:
                raise _Abandoned
            return answer

        result = None
        try:
            result = minimize(ask, starts[index], jac=True, method="L-BFGS-B", options=options)
        except _Abandoned:
            pass
        finally:
            handed_in.put((index, None, result))

    threads = [threading.Thread(target=minimise_one, args=(i,), daemon=True) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    results, going_on, points = {}, set(range(len(starts))), {}
    try:
        while going_on:
            index, point, result = handed_in.get()
            if point is None:
                going_on.remove(index)
                results[index] = result
            else:
                points[index] = point
            if going_on and len(points) == len(going_on):
                evaluated = objectives(dict(sorted(points.items())))
                points = {}
                for i, answer in evaluated.items():
                    answers[i].put(answer)
    finally:
        for i in going_on:  # an evaluation failed: nobody waits for ever
            answers[i].put(None)
    return [results[i] for i in range(len(starts))]


class _Abandoned(Exception):
    """Ends a minimisation whose evaluation failed."""
