"""The search for the best gate, fixed exit or mixture within a limit of GFLOPs or of lost quality."""

import math
from collections.abc import Callable, Iterator, Sequence

from ..derived.dataset import DerivedDataset
from ..exits import exits_up_to, largest_beta
from .fixed import with_gate
from .frontier import GateFitter, Row, fixed_rows, mixture_row
from .mixture import Mixtures


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
    """The frontier row of the best gate or fixed exit within a limit; all rows tried: fixed exits, gates, a mixture.

    beta is found by bisection of its logarithm. Give one limit, both on val:

    target_gflops: most mean total GFLOPs. Among the rows within it, the one of highest quality wins.
    max_pq_drop: most points of quality (of 100) that a row may lose against the last exit for all images. Among the
        rows within it, the one with the fewest GFLOPs wins.

    The best row holds a gate; a fixed exit's gate sends all images there. On a tie the fixed exit wins. The best
    mixture within the limit is among the rows and holds no gate: `best` says whether it is better. No row exceeds
    max_exit. Raises ValueError if no row keeps to the limit. The message has the nearest value reached.
    """
    if (target_gflops is None) == (max_pq_drop is None):
        raise ValueError("give either target_gflops or max_pq_drop")
    if max_pq_drop is not None and not max_pq_drop >= 0:
        raise ValueError(f"max_pq_drop must be a number of points >= 0: {max_pq_drop}")
    fixed, allowed = fixed_rows(val), exits_up_to(val.exits, max_exit)
    if target_gflops is not None and not fixed[0].total_gflops <= target_gflops:
        raise ValueError(f"target_gflops {target_gflops} is below exit {val.exits[0]}'s {fixed[0].total_gflops:.4g}")
    floor = None if max_pq_drop is None else fixed[-1].score - max_pq_drop

    def keeps(row: Row) -> bool:
        return row.total_gflops <= target_gflops if floor is None else row.score >= floor

    fitter = GateFitter(train, val, **options)
    gates = list(_bisect(fitter, max_exit, loss, keeps, cheaper=floor is None, steps=steps))
    rows = [with_gate(row, fitter, loss) for row in fixed if row.max_exit in allowed] + gates
    good = [row for row in rows if keeps(row)]
    if not good:
        least = fixed[-1].score - max(row.score for row in rows)
        raise ValueError(
            f"no gate or exit up to exit {max_exit} loses at most {max_pq_drop} points: the least is {least:.3g}"
        )
    mixtures = Mixtures(val, max_exit, fitter.seed)
    mixture = mixtures.at(target_gflops) if floor is None else mixtures.cheapest(floor)
    if mixture and not mixture.is_fixed:
        rows.append(mixture_row(mixtures, mixture, beta=None, max_exit=max(mixture.exits), loss=None))
    return best(good, by_quality=floor is None), rows


def best(rows: Sequence[Row], by_quality: bool) -> Row:
    """Of rows that keep to a limit the one of highest quality, or else the one of fewest GFLOPs.

    Where two are equally good, the other number decides, and then the order.
    """
    return min(rows, key=lambda row: (-row.score, row.total_gflops) if by_quality else (row.total_gflops, -row.score))


def _bisect(
    fitter: GateFitter, max_exit: int, loss: str, keeps: Callable[[Row], bool], cheaper: bool, steps: int
) -> Iterator[Row]:
    """Yields frontier rows of gates whose beta approaches the limit. cheaper: a larger beta helps to keep to it."""
    # quality lies in [0, 1]: with beta above 1 all images leave at the first exit
    most = min(1.0, largest_beta(loss, fitter.train.quality, fitter.train.exits, max_exit))
    for beta in (0.0, most):
        row = fitter.fit(beta, max_exit, loss)
        yield row
        if (beta == 0.0) == cheaper and keeps(row):
            return  # the best end of the range keeps to the limit already
    if most <= 0:
        return
    low, high = math.log(min(1e-6, most)), math.log(most)
    for _ in range(steps):
        middle = (low + high) / 2
        row = fitter.fit(math.exp(middle), max_exit, loss)
        yield row
        low, high = (low, middle) if keeps(row) == cheaper else (middle, high)
