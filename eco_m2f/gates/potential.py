"""How much any gate could win on a derived dataset, and how much of it is chance.

All gains are mean utilities (Eq. 4) in points of quality, over the best fixed exit. No mixture of fixed exits has a
higher mean utility than the best of them, because utility is linear.

Exit targets are chosen by the very qualities that rate them, so a part of their gain is chance. A second view of the
same images shows how large that part is. Ridge regression shows how much the recorded features predict.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..derived.dataset import DerivedDataset
from ..exits import exits_up_to, utility
from .fit import fit_gate

FOLDS, RESAMPLES, CONFIDENCE = 5, 1000, 0.95
LEAST_IMAGES = 3  # of a cross-validation
_PENALTIES = (*np.logspace(-4, 4, 17), math.inf)  # per image, on standardised features; inf is the mean alone
_AT_ONCE = 2**22  # draws of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean over images in points, and its bootstrap interval of `CONFIDENCE`."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray, seed: int = 0) -> "Estimate":
        """values: [N], one for each image. The same seed gives the same interval."""
        rng, number = np.random.default_rng(seed % 2**63), len(values)
        size = max(1, _AT_ONCE // number)
        parts = [min(size, RESAMPLES - first) for first in range(0, RESAMPLES, size)]
        means = np.concatenate([values[rng.integers(0, number, (part, number))].mean(axis=1) for part in parts])
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Survival:
    """What exit targets gain on two views of the same images.

    gain: rated on the view that chose them. survives: rated on the other view. Both are means over the two directions.
    The best choice without chance gains at least what survives, and at most the gain, up to sampling.
    """

    gain: Estimate
    survives: Estimate

    @property
    def share(self) -> float:
        """The part of the gain that survives; NaN without a gain."""
        return self.survives.value / self.gain.value if self.gain.value > 0 else math.nan


@dataclass(frozen=True)
class Predictable:
    """What the features predict, out of fold.

    r2: {exit: R2 of the utility minus that of the deepest exit}, NaN where it never varies. gain: of the exit with the
    highest predicted utility. oracle: of the exit targets on the same images, over the same fixed exits.
    """

    r2: dict[int, float]
    gain: Estimate
    oracle: Estimate


def utilities(dataset: DerivedDataset, beta: float, max_exit: int) -> np.ndarray:
    """[N, E'] in points, at the exits up to max_exit. Raises ValueError as `exits.utility` does."""
    allowed = exits_up_to(dataset.exits, max_exit)
    return 100 * utility(dataset.quality, dataset.exits, beta).numpy()[:, : len(allowed)]


def best_fixed(utilities: np.ndarray) -> int:
    """The column of the highest mean utility. Of equal ones it is the first."""
    return int(utilities.mean(axis=0).argmax())


def gain_over_fixed(utilities: np.ndarray, columns: np.ndarray, fixed: int | np.ndarray) -> np.ndarray:
    """[N]: the utility of each image at its column, minus that at the fixed one."""
    rows = np.arange(len(utilities))
    return utilities[rows, columns] - utilities[rows, fixed]


def oracle_gain(utilities: np.ndarray, seed: int = 0) -> Estimate:
    """What exit targets gain (Eq. 5). utilities: [N, E']."""
    return Estimate.of(gain_over_fixed(utilities, utilities.argmax(axis=1), best_fixed(utilities)), seed)


def survival(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Survival:
    """How much of the exit targets' gain survives on another view. first, second: utilities [N, E'] of the two views.

    The fixed exit is the best one over both views.
    """
    fixed = best_fixed((first + second) / 2)
    chosen, other = first.argmax(axis=1), second.argmax(axis=1)

    def mean(columns_of_first: np.ndarray, columns_of_second: np.ndarray) -> Estimate:
        ours, theirs = ((first, columns_of_first), (second, columns_of_second))
        return Estimate.of((gain_over_fixed(*ours, fixed) + gain_over_fixed(*theirs, fixed)) / 2, seed)

    return Survival(gain=mean(chosen, other), survives=mean(other, chosen))


def predictable(features: np.ndarray, utilities: np.ndarray, exits: Sequence[int], seed: int = 0) -> Predictable:
    """Cross-validated ridge regression from the features [N, C] to u_k - u_last, for the exits of utilities [N, E'].

    Everything is chosen in the training folds: penalties, by leaving out one image at a time, and the fixed exit.
    Raises ValueError for fewer than `LEAST_IMAGES` images.
    """
    if len(utilities) < LEAST_IMAGES:
        raise ValueError(f"cross-validation needs {LEAST_IMAGES} images or more, not {len(utilities)}: derive more")
    differences = utilities - utilities[:, -1:]  # [N, E']
    predicted, mean, fixed = np.empty_like(differences), np.empty_like(differences), np.empty(len(utilities), int)
    for train, test in _folds(len(utilities), seed):
        predicted[test], mean[test] = _ridge(features[train], differences[train], features[test])
        fixed[test] = best_fixed(utilities[train])
    left, spread = (np.square(differences - p).sum(axis=0) for p in (predicted, mean))  # [E']
    r2 = 1 - np.divide(left, spread, out=np.full(len(exits), math.nan), where=spread > 1e-12)
    return Predictable(
        r2={k: float(value) for k, value in zip(exits[:-1], r2)},
        gain=Estimate.of(gain_over_fixed(utilities, predicted.argmax(axis=1), fixed), seed),
        oracle=Estimate.of(gain_over_fixed(utilities, utilities.argmax(axis=1), fixed), seed),
    )


def gate_gain(
    train: DerivedDataset, val: DerivedDataset, beta: float, max_exit: int, loss: str = "hard_ce", seed: int = 0
) -> Estimate:
    """What a gate gains on val, over val's best fixed exit, with its default fit on train."""
    source = {key: train.provenance[key] for key in ("feature_source", "parent_sha256")}
    gate = fit_gate(train.features, train.quality, train.exits, beta, max_exit, loss, seed=seed, **source)
    columns, u = val.columns(gate.choose(torch.from_numpy(val.features))), utilities(val, beta, max_exit)
    return Estimate.of(gain_over_fixed(u, columns, best_fixed(u)), seed)


def check_views(first: DerivedDataset, second: DerivedDataset) -> None:
    """Raises ValueError unless both hold the same images, from the same parent, in different views."""
    for key in ("dataset", "annotation_sha256", "parent_sha256", "exits"):
        ours, theirs = first.provenance.get(key), second.provenance.get(key)
        if ours != theirs:
            raise ValueError(f"{key} is {ours} in the first view, {theirs} in the second: derive both alike")
    if first.quality_name != second.quality_name:
        raise ValueError(
            f"the quality is {first.quality_name} in the first view, {second.quality_name} in the second: derive both "
            "with one MODEL.ECO.QUALITY"
        )
    if first.image_ids != second.image_ids:
        raise ValueError("the two views hold different images: derive both from one annotation")
    if first.view == second.view:
        raise ValueError(f"both derived datasets are of the {first.view} view: derive one of them with --view mirrored")


def _folds(number: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of the training and the test images of each fold."""
    order = np.random.default_rng(seed % 2**63).permutation(number)
    for test in np.array_split(order, min(FOLDS, number)):
        yield np.setdiff1d(order, test), test


def _ridge(features: np.ndarray, wanted: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions [M, E] for new features [M, C], and the mean of the wanted values [N, E].

    Each column has the penalty with the smallest error when each image is left out in turn. That error has a closed
    form: the residual over 1 minus the leverage.
    """
    center, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    std[std <= 1e-6 * np.maximum(np.abs(center), 1e-6)] = 1.0  # a constant feature
    scores, axes, squares = _principal((features - center) / std)
    mean, number = wanted.mean(axis=0), len(wanted)
    along = scores.T @ (wanted - mean)  # [R, E]
    errors, weights = [], []
    for penalty in _PENALTIES:
        shrink = (1 / (squares + penalty * number))[:, None]  # [R, 1]
        leverage = 1 / number + np.square(scores) @ shrink  # [N, 1]
        weights.append(shrink * along)
        errors.append(np.square((wanted - mean - scores @ weights[-1]) / np.maximum(1 - leverage, 1e-9)).sum(axis=0))
    best = len(_PENALTIES) - 1 - np.argmin(errors[::-1], axis=0)  # [E]; of equal ones the largest penalty
    weight = np.stack([weights[i][:, k] for k, i in enumerate(best)], axis=1)  # [R, E]
    return mean + ((new - center) / std) @ (axes @ weight), mean


def _principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [N, C] -> scores [N, R] = x @ axes, axes [C, R], and the squared lengths [R] of the scores' columns."""
    wide = x.shape[1] > x.shape[0]
    squares, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = squares > 1e-10 * max(squares[-1], 1e-300)
    squares, vectors = squares[kept], vectors[:, kept]
    if not wide:
        return x @ vectors, vectors, squares
    return vectors * np.sqrt(squares), x.T @ (vectors / np.sqrt(squares)), squares
