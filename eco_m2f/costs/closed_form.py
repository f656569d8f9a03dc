"""Counts for any size from the counts of a few sizes, exact to the last digit.

A model has the same operators at all sizes. The cost of an operator is a product of sides of its tensors. So the sum is
a linear combination of a few known functions of the size: the tokens of each map, their square for dense attention, and
the tokens of maps padded to whole windows. If the functions of a size are a combination of those of counted sizes, its
counts are the same combination. A few more sizes check this.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain
from math import prod

from .sizes import padded_size

Size = tuple[int, int]
DIRECTLY = 2  # sizes to count before learning the closed form pays
SAMPLES = tuple((1 + 577 * i * i % 1381, 1 + 739 * i**3 % 1423) for i in range(1, 60))  # arbitrary sizes
CHECKS = ((33, 97), (1150, 431), (603, 1331))


class SizeFunctions:
    """The functions of a size: 1, and numbers of tokens. Counts are linear combinations of them."""

    def __init__(self, strides: Sequence[int], squared: Sequence[int] = (), windows: Sequence[int] = ()):
        """
        Args:
            strides: of the maps; sides are rounded up.
            squared: strides of the maps with dense attention.
            windows: sides of windows, in tokens; the maps of each stride are padded to whole windows.
        """
        self._strides, self._squared, self._windows = tuple(strides), tuple(squared), tuple(windows)

    def __call__(self, size: Size) -> list[int]:
        maps = [_tokens(size, s) for s in self._strides]
        squares = [_tokens(size, s) ** 2 for s in self._squared]
        return [1, *maps, *squares, *(_tokens(size, s, w) for s in self._strides for w in self._windows)]


def _tokens(size: Size, *steps: int) -> int:
    """The tokens of a map: both sides are divided by each step in turn, and rounded up."""
    for step in steps:
        size = tuple(-(-side // step) for side in size)
    return prod(size)


class Combinations:
    """Learns counts as linear combinations of functions, by Gaussian elimination in exact fractions."""

    def __init__(self):
        self._rows: dict[int, list[Fraction]] = {}  # {index of the pivot function: [*functions, *counts]}

    def counts(self, functions: Sequence[int]) -> tuple[int, ...] | None:
        """The counts of a size by its functions; None if the learned sizes do not determine them."""
        rest = self._reduced([Fraction(f) for f in functions])
        if any(rest[: len(functions)]) or any(n.denominator != 1 for n in rest):
            return None
        return tuple(-int(n) for n in rest[len(functions) :])

    def learn(self, functions: Sequence[int], counts: Sequence[int]) -> bool:
        """Learns the counts of a size. Returns False, and learns nothing, if they contradict the sizes before."""
        row = self._reduced([Fraction(n) for n in (*functions, *counts)])
        pivot = next((i for i, n in enumerate(row[: len(functions)]) if n), None)
        if pivot is None:
            return not any(row)
        self._rows[pivot] = [n / row[pivot] for n in row]
        return True

    def _reduced(self, row: list[Fraction]) -> list[Fraction]:
        """The row with its pivot functions eliminated. Missing counts start at 0."""
        width = max((len(known) for known in self._rows.values()), default=len(row))
        row = row + [Fraction(0)] * (width - len(row))
        for pivot, known in self._rows.items():
            if row[pivot]:
                factor = row[pivot]
                row = [a - factor * b for a, b in zip(row, known)]
        return row


class SizeCounts:
    """Counts of images of any size: the first sizes directly, later ones in closed form.

    Learning counts as many sizes as the functions need, and then `CHECKS`. If a check disagrees, all sizes are counted
    directly. So are sizes that are no multiples of `step` and sizes that the closed form does not determine.
    """

    def __init__(self, count: Callable[[Size], tuple[int, ...]], functions: SizeFunctions, step: int = 1):
        """
        Args:
            count: a size -> its counts, always in the same order.
            functions: see `SizeFunctions`.
            step: both sides must be multiples of this.
        """
        self._count, self._functions, self._step = count, functions, step
        self._counted: dict[Size, tuple[int, ...]] = {}  # directly
        self._computed: dict[Size, tuple[int, ...]] = {}  # in closed form
        self._form: Combinations | None = None
        self._fits = True

    def __call__(self, size: Size) -> tuple[int, ...]:
        if size not in self._counted and size not in self._computed:
            counts = self._in_closed_form(size)
            if counts is None:
                return self._directly(size)
            self._computed[size] = counts
        return self._computed.get(size) or self._counted[size]

    def _in_closed_form(self, size: Size) -> tuple[int, ...] | None:
        if not self._fits or len(self._counted) < DIRECTLY or size != padded_size(size, self._step):
            return None
        self._form = self._form or self._learned()
        return self._form.counts(self._functions(size)) if self._form else None

    def _directly(self, size: Size) -> tuple[int, ...]:
        if size not in self._counted:
            self._counted[size] = self._count(size)
        return self._counted[size]

    def _learned(self) -> Combinations | None:
        """The closed form. None, from then on, if a size contradicts it."""
        form, f = Combinations(), self._functions
        counted = [size for size in self._counted if size == padded_size(size, self._step)]
        samples, checks = ([padded_size(size, self._step) for size in sizes] for sizes in (SAMPLES, CHECKS))
        needed = (size for size in samples if form.counts(f(size)) is None)  # evaluated while learning
        self._fits = all(form.learn(f(size), self._directly(size)) for size in chain(counted, needed, checks))
        return form if self._fits else None
