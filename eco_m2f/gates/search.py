"""The search for the gate that keeps to a limit of GFLOPs or of lost quality."""

import math
from collections.abc import Callable, Iterator

from ..derived.dataset import DerivedDataset
from ..exits import largest_beta
from .frontier import GateFitter, Row, fixed_rows


def search_budget(
    train: DerivedDataset,
    val: DerivedDataset,
    max_exit: int,
    loss: str = "hard_ce",
    *,
    target_gflops: float | None = None,
    max_pq_drop: float | None = None,
    steps: int = 12,
    **options,
) -> tuple[Row, list[Row]]:
    """The gate that keeps to a limit, and all gates tried for it, beta being searched by bisection of its logarithm.

    target_gflops: the mean total GFLOPs on val that must not be exceeded; among the gates below it, the one with the
    highest quality wins. max_pq_drop: the points of quality (of 100) that may be lost on val against the last exit for
    all; among the gates that keep to it, the one with the fewest GFLOPs wins. Give one of the two.
    Raises ValueError if no gate keeps to the limit, and says how near one comes.
    """
    if (target_gflops is None) == (max_pq_drop is None):
        raise ValueError("give either target_gflops or max_pq_drop")
    if max_pq_drop is not None and not max_pq_drop >= 0:
        raise ValueError(f"max_pq_drop must be a number of points >= 0: {max_pq_drop}")
    fixed = fixed_rows(val)
    if target_gflops is not None and not fixed[0].total_gflops <= target_gflops:
        raise ValueError(f"target_gflops {target_gflops} is below exit {val.exits[0]}'s {fixed[0].total_gflops:.4g}")
    floor = None if max_pq_drop is None else fixed[-1].score - max_pq_drop

    def keeps(row: Row) -> bool:
        return row.total_gflops <= target_gflops if floor is None else row.score >= floor

    def rank(row: Row) -> float:
        return row.score if floor is None else -row.total_gflops

    rows = list(_bisect(GateFitter(train, val, **options), max_exit, loss, keeps, cheaper=floor is None, steps=steps))
    good = [row for row in rows if keeps(row)]
    if not good and floor is None:
        least = min(row.total_gflops for row in rows)
        raise ValueError(f"no gate up to exit {max_exit} keeps to {target_gflops} GFLOPs: the least is {least:.4g}")
    if not good:
        least = fixed[-1].score - max(row.score for row in rows)
        raise ValueError(f"no gate up to exit {max_exit} loses at most {max_pq_drop} points: the least is {least:.3g}")
    return max(good, key=rank), rows


def _bisect(
    fitter: GateFitter, max_exit: int, loss: str, keeps: Callable[[Row], bool], cheaper: bool, steps: int
) -> Iterator[Row]:
    """Gates whose beta closes in on the limit. cheaper: a larger beta is what helps to keep to it."""
    # q lies in [0, 1]: with beta above 1 all leave at the first exit
    most = min(1.0, largest_beta(loss, fitter.train.quality, fitter.train.exits, max_exit))
    for beta in (0.0, most):
        row = fitter.fit(beta, max_exit, loss)
        yield row
        if (beta == 0.0) == cheaper and keeps(row):
            return  # the end of the range that is best otherwise keeps to the limit already
    if most <= 0:
        return
    low, high = math.log(min(1e-6, most)), math.log(most)
    for _ in range(steps):
        middle = (low + high) / 2
        row = fitter.fit(math.exp(middle), max_exit, loss)
        yield row
        low, high = (low, middle) if keeps(row) == cheaper else (middle, high)
