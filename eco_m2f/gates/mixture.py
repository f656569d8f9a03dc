"""The mixture: images are sent to fixed exits at random. A gate is useful where it beats the mixture at equal cost.

Fixed exits span a curve of quality over cost. A mixture of two of them reaches every point between, without looking at
an image. The best mixture at most at a cost lies on the upper hull of (mean GFLOPs, quality) of the fixed exits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..derived.counted import CountedQuality, Part
from ..derived.dataset import DerivedDataset

DRAWS, RESAMPLES = 200, 1000
CONFIDENCE = 0.95
GAIN_COLUMNS = ("mixture", "gain", "gain_low", "gain_high", "gain_p")
_ROUNDING = 1e-9  # points of quality
_HALVINGS = 12  # of the share, in the search for the cheapest mixture


@dataclass(frozen=True)
class Mixture:
    """A part of the images, chosen at random, leaves at the deeper of two exits, and the others at the shallower.

    exits: (shallower, deeper). share: the part that leaves at the deeper, in [0, 1).
    """

    exits: tuple[int, int]
    share: float

    @property
    def is_fixed(self) -> bool:
        """Whether all images leave at the shallower exit."""
        return self.share == 0

    def __str__(self) -> str:
        return (
            f"exit {self.exits[0]} for all" if self.is_fixed else "the mixture of exits {} and {}".format(*self.exits)
        )


@dataclass(frozen=True)
class Gain:
    """What a choice of exits gains over the mixture of the same mean GFLOPs, in points of quality.

    score: of the mixture. low, high: the interval of `CONFIDENCE`. p: of a gain of 0 or less, one-sided.
    """

    mixture: Mixture
    score: float
    gain: float
    low: float
    high: float
    p: float

    @property
    def is_proven(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0

    def numbers(self) -> dict[str, float]:
        """Of the CSV's `GAIN_COLUMNS`."""
        return dict(zip(GAIN_COLUMNS, (self.score, self.gain, self.low, self.high, self.p)))


def upper_hull(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Which points span the best quality at most at a cost, by increasing cost.

    The cheapest point is always among them. From one to the next the quality rises, and less and less steeply.
    """
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if kept and scores[i] <= scores[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(costs, scores, kept[-2], i) >= _slope(costs, scores, kept[-2], kept[-1]):
            kept.pop()
        kept.append(i)
    return kept


def _slope(costs: Sequence[float], scores: Sequence[float], i: int, j: int) -> float:
    return (scores[j] - scores[i]) / (costs[j] - costs[i])


class Mixtures:
    """The mixtures of the fixed exits of a derived dataset, and the gains over them.

    Where the quality of the dataset is an exact sum, that of a mixture is the mean over seeded draws. In each draw the
    number of images at the deeper exit is the share, up to one image. Where it is no sum, it is the mean quality of the
    images, whose expectation has a closed form. The same seed gives the same numbers.
    """

    def __init__(
        self,
        dataset: DerivedDataset,
        max_exit: int | None = None,
        seed: int = 0,
        draws: int = DRAWS,
        resamples: int = RESAMPLES,
    ):
        """max_exit: the deepest exit to mix. Raises ValueError where the dataset's quality is not known."""
        self.dataset, self.draws, self.resamples = dataset, draws, resamples
        self.seed = seed % 2**63  # numpy takes none below 0
        self._counted = CountedQuality(dataset) if dataset.quality_kind.exact and dataset.has_statistics else None
        self._rows: dict[Mixture, dict] = {}
        exits = [k for k in dataset.exits if max_exit is None or k <= max_exit]
        choices = [np.full(len(dataset), k) for k in exits]
        if self._counted and math.isnan(self._score(choices[-1])):
            self._counted = None  # no category counts anywhere
        costs = [dataset.mean_gflops(choice)["total"] for choice in choices]
        scores = [self._score(choice) for choice in choices]
        hull = upper_hull(costs, scores)
        self.exits, self.costs, self.scores = ([values[i] for i in hull] for values in (exits, costs, scores))

    def at(self, gflops: float) -> Mixture:
        """The best mixture whose mean total GFLOPs are at most these; the cheapest exit where there is none."""
        i = max(0, int(np.searchsorted(self.costs, gflops, side="right")) - 1)
        if i + 1 == len(self.costs) or gflops <= self.costs[i]:
            return Mixture((self.exits[i],) * 2, 0.0)
        share = (gflops - self.costs[i]) / (self.costs[i + 1] - self.costs[i])
        return Mixture((self.exits[i], self.exits[i + 1]), share)

    def cheapest(self, score: float) -> Mixture | None:
        """The mixture with the fewest GFLOPs whose quality is at least this, in points; None where there is none."""
        i = next((i for i, reached in enumerate(self.scores) if reached >= score), None)
        if i is None:
            return None
        if i == 0:
            return Mixture((self.exits[0],) * 2, 0.0)
        low, high = 0.0, 1.0  # the quality is enough at high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = self.score(Mixture((self.exits[i - 1], self.exits[i]), middle)) >= score
            low, high = (low, middle) if enough else (middle, high)
        return Mixture((self.exits[i],) * 2, 0.0) if high == 1 else Mixture((self.exits[i - 1], self.exits[i]), high)

    def score(self, mixture: Mixture) -> float:
        """The quality of the dataset in points: the mean over the draws, or the expectation."""
        return self.row(mixture)["score"]

    def row(self, mixture: Mixture) -> dict:
        """Its quality and cost, as `frontier.Row` has them; "score"; and "spread", the standard deviation of the draws.

        Costs, the exit and the mean over the images are expectations. Numbers of images are rounded.
        """
        if mixture not in self._rows:
            self._rows[mixture] = self._row(mixture)
        return dict(self._rows[mixture])

    def _row(self, mixture: Mixture) -> dict:
        dataset, (shallow, deep) = self.dataset, mixture.exits
        pair = [np.full(len(dataset), k) for k in mixture.exits]

        def mixed(of) -> float:
            return (1 - mixture.share) * of(pair[0]) + mixture.share * of(pair[1])

        quality, images = 100 * mixed(dataset.mean_quality), dict.fromkeys(dataset.exits, 0)
        images[deep] = round(mixture.share * len(dataset))
        images[shallow] += len(dataset) - images[deep] if deep != shallow else len(dataset)
        exact, score, spread = dict.fromkeys(dataset.quality_kind.columns, math.nan), quality, 0.0
        if dataset.quality_kind.exact is None:
            exact = {}
        if self._counted:
            drawn = self._counted(self._parts(mixture))
            exact = {column: 100 * float(values.mean()) for column, values in drawn.items()}
            first = next(iter(drawn.values()))
            score, spread = 100 * float(first.mean()), 100 * float(first.std())
        return {
            "exact": exact,
            "quality": quality,
            "mean_exit": mixed(dataset.mean_exit),
            "total_gflops": mixed(lambda choice: dataset.mean_gflops(choice)["total"]),
            "encoder_gflops": mixed(lambda choice: dataset.mean_gflops(choice)["encoder"]),
            "images": images,
            "score": score,
            "spread": spread,
        }

    def gain(self, choice) -> Gain:
        """The gain of a choice of exits [N] over the mixture at its cost, by a paired bootstrap over the images.

        An image that is drawn again brings its quality and cost at every exit along. In a resample the choice and the
        mixture therefore see the same images. The share of the mixture is set anew there, for the cost of the choice in
        that resample. Which exits can be mixed is settled once, on the whole dataset. In a resample the mixture's
        quality is read off the line between the exact qualities of its two exits. How much the draws differ from that
        line is found on the whole dataset and added. The interval is that of the percentiles. p is the part of the
        resamples without a gain.
        """
        choice = np.asarray(choice)
        gflops = self.dataset.mean_gflops(choice)["total"]
        mixture = self.at(gflops)
        score = self.score(mixture)
        bend = score - np.interp(gflops, self.costs, self.scores)
        costs, scores = self._fixed_resamples
        cost, reached = self._resampled(choice)
        line = np.array([np.interp(*point) for point in zip(cost, costs, scores)])  # [R]
        gains = reached - line - bend
        gains = gains[~np.isnan(gains)]  # no category counts in a resample of a few images
        gains[np.abs(gains) < _ROUNDING] = 0.0
        gain = self._score(choice) - score
        gain = 0.0 if abs(gain) < _ROUNDING else gain
        low, high = np.quantile(gains, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        p = (1 + np.count_nonzero(gains <= 0)) / (1 + len(gains))
        return Gain(mixture, score, gain, float(low), float(high), float(p))

    def _score(self, choice: np.ndarray) -> float:
        """The quality of the dataset, in points."""
        if self._counted:
            return 100 * next(iter(self.dataset.exact_quality(choice).values()))
        return 100 * self.dataset.mean_quality(choice)

    def _parts(self, mixture: Mixture) -> list[Part]:
        """The draws: as many images as the share says leave at the deeper exit."""
        number, (shallow, deep) = len(self.dataset), mixture.exits
        if mixture.is_fixed:
            return [(np.full(number, shallow), np.ones((1, number), np.uint8))]
        whole = np.floor(mixture.share * number + self._lots[:, -1:])  # [draws, 1]: rounded up as often as it should be
        at_deep = (self._ranks < whole).astype(np.uint8)
        return [(np.full(number, shallow), 1 - at_deep), (np.full(number, deep), at_deep)]

    @cached_property
    def _lots(self) -> np.ndarray:
        """[draws, N + 1] in [0, 1)."""
        return np.random.default_rng([self.seed, 0]).random((self.draws, len(self.dataset) + 1))

    @cached_property
    def _ranks(self) -> np.ndarray:
        """[draws, N]: in a draw, the images with the smallest ranks leave at the deeper exit."""
        return np.argsort(np.argsort(self._lots[:, :-1], axis=1), axis=1).astype(np.int32)

    @cached_property
    def _counts(self) -> np.ndarray:
        """[R, N]: how often an image is drawn in a resample."""
        rng, number = np.random.default_rng([self.seed, 1]), len(self.dataset)
        counts = np.zeros((self.resamples, number), np.uint8)  # 255 times is out of reach
        for rows in _slices(self.resamples, number):
            drawn = rng.integers(0, number, (rows.stop - rows.start, number))
            flat = np.bincount((drawn + np.arange(len(drawn))[:, None] * number).ravel(), minlength=drawn.size)
            counts[rows] = flat.reshape(drawn.shape)
        return counts

    @cached_property
    def _fixed_resamples(self) -> tuple[np.ndarray, np.ndarray]:
        """[R, exits on the hull] twice: mean total GFLOPs, and quality in points."""
        found = [self._resampled(np.full(len(self.dataset), k)) for k in self.exits]
        costs, scores = (np.stack(values, axis=1) for values in zip(*found))
        return costs, scores

    def _resampled(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[R] twice, of a choice in each resample: mean total GFLOPs, and quality in points."""
        dataset = self.dataset
        at = np.arange(len(dataset)), dataset.columns(choice)
        cost = self._means(dataset.total_gflops[at])
        if self._counted:
            return cost, 100 * next(iter(self._counted([(choice, self._counts)]).values()))
        return cost, 100 * self._means(dataset.quality[at])

    def _means(self, values: np.ndarray) -> np.ndarray:
        """values [N] -> [R], their means over the images of each resample."""
        chunks = (self._counts[rows].astype(np.float64) @ values for rows in _slices(self.resamples, len(values)))
        return np.concatenate(list(chunks)) / len(values)


def _slices(number: int, width: int) -> list[slice]:
    """Of rows of a width, so many at a time that they fit into the caches."""
    size = max(1, 2**18 // width)
    return [slice(first, min(first + size, number)) for first in range(0, number, size)]
