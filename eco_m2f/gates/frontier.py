"""Fits a gate for each budget (beta, K, loss), and computes its quality and GFLOPs: a row of the frontier.

This needs no images and no parent. For any choice of exits, quality and GFLOPs are sums over the derived rows, so a
gate of a frontier takes seconds. If the quality of a dataset is no sum over its images (AP), the mean over the images
is used.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..derived.dataset import DerivedDataset
from ..exits import check_has_minimum, exit_targets, exits_up_to
from .fit import AdamOptions, Scaling, fit_gates
from .gate import Gate
from .mixture import GAIN_COLUMNS, Gain, Mixture, Mixtures


@dataclass
class Row:
    """A frontier row: quality and cost of one way to choose exits on a derived dataset. The CSV has a line for each.

    policy: "fixed" (all images leave at max_exit), "oracle" (the exit targets of Eq. 5), "gate", or "mixture" (of fixed
    exits, at the cost of the gate with this beta, max_exit and loss). Qualities are in points of 100. GFLOPs are means
    over the images. gain: the gain of a gate or of exit targets over the mixture. spread: the standard deviation of a
    mixture's draws, in points.
    """

    policy: str
    beta: float | None
    max_exit: int
    loss: str | None
    exact: dict[str, float]  # {column: of the whole dataset}; NaN without statistics, {} if the quality is no sum
    quality: float  # mean over the images
    mean_exit: float
    total_gflops: float
    encoder_gflops: float
    images: dict[int, int]  # {exit: number of images that leave there}
    gate: Gate | None = None
    gain: Gain | None = None
    spread: float | None = None

    @property
    def score(self) -> float:
        """The exact quality of the dataset if it is known, else the mean over its images."""
        exact = next(iter(self.exact.values()), math.nan)
        return self.quality if math.isnan(exact) else exact

    def numbers(self) -> dict:
        """All fields but the gate, flat: a line of the CSV."""
        flat: dict = {}
        for key, value in vars(self).items():
            if key not in ("images", "gate", "gain", "spread"):
                flat |= value if key == "exact" else {key: value}
        gain = self.gain.numbers() if self.gain else dict.fromkeys(GAIN_COLUMNS)
        return {**flat, **{f"images_exit{k}": n for k, n in self.images.items()}, **gain, "mixture_spread": self.spread}


def measure(dataset: DerivedDataset, choice, **about) -> Row:
    """The frontier row if image i of the dataset leaves at exit choice[i]. about: the other fields.

    Raises ValueError if the quality in the dataset is not registered.
    """
    choice, kind = np.asarray(choice), dataset.quality_kind
    exact = {}
    if kind.exact is not None:
        absent = dict.fromkeys(kind.columns, math.nan)
        exact = dataset.exact_quality(choice) if dataset.has_statistics else absent
    gflops = dataset.mean_gflops(choice)
    return Row(
        exact={column: 100 * value for column, value in exact.items()},
        quality=100 * dataset.mean_quality(choice),
        mean_exit=dataset.mean_exit(choice),
        total_gflops=gflops["total"],
        encoder_gflops=gflops["encoder"],
        images={k: int(np.sum(choice == k)) for k in dataset.exits},
        **about,
    )


def check_pair(train: DerivedDataset, val: DerivedDataset) -> None:
    """Raises ValueError unless a gate can be fitted on train and evaluated on val."""
    for dataset in (train, val):
        if dataset.features is None:
            raise ValueError(f"{dataset.provenance['dataset']} was loaded without features: a gate needs them")
    if train.quality_kind is not val.quality_kind:
        raise ValueError(
            f"the quality is {train.quality_name} for training, {val.quality_name} for validation: derive both "
            "with one MODEL.ECO.QUALITY"
        )
    for key in ("parent_sha256", "exits", "feature_source"):
        if train.provenance[key] != val.provenance[key]:
            ours, theirs = train.provenance[key], val.provenance[key]
            raise ValueError(f"{key} is {ours} for training, {theirs} for validation: derive both with one parent")
    if train.view != val.view:
        raise ValueError(
            f"the view is {train.view} for training, {val.view} for validation: derive both with one --view"
        )


class GateFitter:
    """Fits gates of several budgets on one derived dataset, and computes their frontier rows on another."""

    def __init__(
        self,
        train: DerivedDataset,
        val: DerivedDataset,
        optimizer: str = "lbfgs",
        l2=None,
        seed: int = 0,
        adam: AdamOptions = AdamOptions(),
    ):
        """Raises ValueError unless both have the same registered quality, parent, exits, feature source and view."""
        check_pair(train, val)
        self.train, self.val, self.optimizer, self.seed, self.adam = train, val, optimizer, seed, adam
        self.features, self.val_features = torch.from_numpy(train.features), torch.from_numpy(val.features)
        self.l2 = self.features.shape[1] / len(self.features) if l2 is None else l2
        self.scaling = Scaling.of(self.features, self.l2, seed)
        self.mixtures = Mixtures(val, seed=seed)

    def fit(self, beta: float, max_exit: int, loss: str = "hard_ce") -> Row:
        """The frontier row of one gate. `row.gate` is the gate, and `gate.results` has the numbers of the row."""
        return self.fit_all([(beta, max_exit, loss)])[0]

    def fit_all(self, budgets: Sequence[tuple[float, int, str]]) -> list[Row]:
        """The frontier rows of several budgets (beta, max_exit, loss). Their gates are fitted side by side."""
        source = self.train.provenance
        gates = fit_gates(
            self.features,
            self.train.quality,
            self.train.exits,
            budgets,
            feature_source=source["feature_source"],
            parent_sha256=source["parent_sha256"],
            optimizer=self.optimizer,
            l2=self.l2,
            seed=self.seed,
            scaling=self.scaling,
            adam=self.adam,
        )
        return [self._row(gate) for gate in gates]

    def _row(self, gate: Gate) -> Row:
        about = {"policy": "gate", "beta": gate.beta, "max_exit": gate.max_exit, "loss": gate.loss}
        choice = gate.choose(self.val_features)
        row = measure(self.val, choice, gain=self.mixtures.gain(choice), **about)
        gate.results = {**row.numbers(), "measured_on": self.val.provenance["dataset"], "num_images": len(self.val)}
        row.gate = gate
        return row


def fixed_rows(dataset: DerivedDataset) -> list[Row]:
    """A frontier row per exit: all images leave there."""
    about = {"policy": "fixed", "beta": None, "loss": None}
    return [measure(dataset, np.full(len(dataset), k), max_exit=k, **about) for k in dataset.exits]


def oracle_row(dataset: DerivedDataset, beta: float, max_exit: int, mixtures: Mixtures | None = None) -> Row:
    """The frontier row of the exit targets (Eq. 5). No gate reaches a higher utility. mixtures: to add its gain."""
    targets = exit_targets(dataset.quality, dataset.exits, beta, max_exit)
    gain = mixtures.gain(targets) if mixtures else None
    return measure(dataset, targets, policy="oracle", beta=beta, max_exit=max_exit, loss=None, gain=gain)


def mixture_row(mixtures: Mixtures, mixture: Mixture, **about) -> Row:
    """A mixture; about: beta, max_exit and loss of the gate that it stands beside."""
    row = mixtures.row(mixture)
    row.pop("score")
    return Row(policy="mixture", **row, **about)


def beside(mixtures: Mixtures, gate: Row) -> Row:
    """The mixture that costs what a gate costs."""
    return mixture_row(mixtures, gate.gain.mixture, beta=gate.beta, max_exit=gate.max_exit, loss=gate.loss)


def frontier(
    train: DerivedDataset,
    val: DerivedDataset,
    betas: Sequence[float],
    max_exits: Sequence[int],
    losses: Sequence[str] = ("hard_ce",),
    **options,
) -> Iterator[Row]:
    """Yields the frontier rows on val: fixed exits; for each K and beta the oracle, a gate per loss, and its mixture.

    options: optimizer, l2, seed, adam of `GateFitter`. All gates of one K are fitted before the first of them comes.
    """
    for max_exit in max_exits:
        exits_up_to(train.exits, max_exit)  # errors come before the first fit
        for beta, loss in itertools.product(betas, losses):
            check_has_minimum(loss, train.quality, train.exits, beta, max_exit)
    fitter = GateFitter(train, val, **options)
    yield from fixed_rows(val)
    for max_exit in max_exits:
        gates = iter(fitter.fit_all([(beta, max_exit, loss) for beta in betas for loss in losses]))
        for beta in betas:
            yield oracle_row(val, beta, max_exit, fitter.mixtures)
            for gate in itertools.islice(gates, len(losses)):
                yield gate
                yield beside(fitter.mixtures, gate)


def header(dataset: DerivedDataset) -> str:
    """The column titles for `format_row`, for rows on a dataset."""
    kind = dataset.quality_kind
    exact = "".join(f"{title:{width}} " for title, width in _exact_columns(kind).items())
    images = f"{'images per exit':{_images_width(dict.fromkeys(dataset.exits, len(dataset)))}}"
    return f"policy  K  beta     loss      {exact}quality  exit   GFLOPs    encoder  {images} gain  from  to    p"


def format_row(row: Row, kind: type) -> str:
    """A frontier row as a line under `header`. The gain over the mixture is in points; from and to are its interval."""
    beta = "-" if row.beta is None else f"{row.beta:.3g}"
    images = " ".join(f"{k}:{n}" for k, n in row.images.items())
    exact = "".join(f"{_points(v):{width}} " for v, width in zip(row.exact.values(), _exact_columns(kind).values()))
    line = (
        f"{row.policy:7} {row.max_exit:<2} {beta:8} {row.loss or '-':9} {exact}{row.quality:<8.2f} "
        f"{row.mean_exit:<6.3f} {row.total_gflops:<9.2f} {row.encoder_gflops:<8.2f} {images}"
    )
    if not row.gain:
        return line
    gain = " ".join(f"{value:<+5.2f}" for value in (row.gain.gain, row.gain.low, row.gain.high))
    aside = _images_width(dict.fromkeys(row.images, sum(row.images.values()))) - len(images)
    return f"{line}{' ' * aside} {gain} {row.gain.p:.3f}"


def _images_width(images: dict[int, int]) -> int:
    """Of the column of images, where every exit has as many."""
    return max(len("images per exit"), len(" ".join(f"{k}:{n}" for k, n in images.items())))


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _exact_columns(kind: type) -> dict[str, int]:
    """{title: width} of the exact qualities."""
    return {title: max(6, len(title)) for title in kind.columns.values()} if kind.exact else {}
