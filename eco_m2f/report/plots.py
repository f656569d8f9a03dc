"""Plots of quality over cost and of the exits taken."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from ..derived.dataset import DerivedDataset
from ..files import atomic_write
from ..gates.frontier import Row
from ..gates.mixture import upper_hull
from .predictions import Example
from .results import PARENT, STEP_A, TARGETS, Result

DPI = 120


STYLES = (  # model, policy, line, colour, label
    (PARENT, "fixed", "o--", "tab:gray", "fixed exits, without Step A"),
    (STEP_A, "fixed", "o-", "tab:blue", "fixed exits, after Step A"),
    (STEP_A, "gate", "D", "tab:red", "gates"),
    (TARGETS, "oracle", "^:", "tab:green", "exit targets of Eq. 5 (upper bound)"),
)


def plot_quality(results: Sequence[Result], kind: type, path: Path) -> None:
    """Quality over the encoder's cost: fixed exits with and without Step A, the gates, the exit targets."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    draw_quality(axes, results, kind)
    save(figure, path)


def plot_overview(results: Sequence[Result], kind: type, examples: Sequence[Example], path: Path) -> None:
    """Quality and cost on the left, images with their predictions on the right."""
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    draw_quality(left.subplots(), results, kind)
    draw_examples(right, examples, ("image", "prediction"))
    save(figure, path)


def plot_predictions(examples: Sequence[Example], path: Path) -> None:
    """Images, ground truth and predictions; the exits stand above."""
    figure = plt.figure(figsize=(2 * len(examples), 6.6), layout="constrained")
    draw_examples(figure, examples, ("image", "truth", "prediction"))
    save(figure, path)


def draw_quality(axes: Axes, results: Sequence[Result], kind: type) -> None:
    full = max(r.row.encoder_gflops for r in results)
    for model, policy, style, color, label in STYLES:
        rows = [r.row for r in results if r.model == model and r.row.policy == policy]
        axes.plot([r.encoder_gflops for r in rows], [r.score for r in rows], style, color=color, label=label)
        label_points(axes, rows, color, 0.04 * full)
    draw_mixtures(axes, [r.row for r in results if r.model == STEP_A and r.row.policy == "fixed"])
    axes.margins(y=0.15)
    title = next(iter(kind.columns.values()))
    axes.set(xlabel="encoder GFLOPs per image", ylabel=title, title="Quality and cost (numbers: exit or beta)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_mixtures(axes: Axes, fixed: Sequence[Row]) -> None:
    """The best mixtures of fixed exits: the line over their hull."""
    hull = upper_hull([r.total_gflops for r in fixed], [r.score for r in fixed])
    points = [(fixed[i].encoder_gflops, fixed[i].score) for i in hull]
    axes.plot(*zip(*points), "-", color="black", linewidth=1, label="mixture of fixed exits")


def label_points(axes: Axes, rows: Sequence[Row], color: str, near: float) -> None:
    """The exit or the beta beside each point. Labels of points that coincide stand in a column."""
    shift, last = 0, -1.0
    for r in rows:
        shift = shift + 9 if abs(r.encoder_gflops - last) < near else 0
        text, last = str(r.max_exit) if r.policy == "fixed" else f"{r.beta:g}", r.encoder_gflops
        offset = (4, -12 - shift if r.policy == "gate" else 4 + shift)
        axes.annotate(text, (last, r.score), offset, textcoords="offset points", fontsize=8, color=color)


def draw_examples(figure: FigureBase, examples: Sequence[Example], parts: Sequence[str]) -> None:
    """A column for each example, a row for each part of it."""
    grid = figure.subplots(len(parts), len(examples), squeeze=False)
    for column, example in zip(grid.T, examples):
        for ax, part in zip(column, parts):
            ax.imshow(getattr(example, part))
            ax.axis("off")
        column[0].set_title(example.title, fontsize=10)
    for ax, part in zip(grid[:, 0], parts):
        name = {"truth": "ground truth"}.get(part, part)
        ax.text(-0.06, 0.5, name, rotation=90, va="center", ha="right", transform=ax.transAxes)


def plot_exits(results: Sequence[Result], val: DerivedDataset, path: Path) -> None:
    """How many images leave at each exit, as chosen by each gate and as Eq. 5 would have it."""
    gates = [r.row for r in results if r.row.policy == "gate"]
    targets = [r.row for r in results if r.row.policy == "oracle"]
    figure, axes = plt.subplots(1, len(gates), figsize=(3.2 * len(gates), 3.2), sharey=True, layout="constrained")
    for ax, gate, target in zip(np.atleast_1d(axes), gates, targets):
        exits = np.array(val.exits)
        ax.bar(exits - 0.2, [100 * gate.images[k] / len(val) for k in val.exits], 0.4, label="gate", color="tab:red")
        share = [100 * target.images[k] / len(val) for k in val.exits]
        ax.bar(exits + 0.2, share, 0.4, label="exit target", color="tab:green")
        ax.set(xlabel="exit", title=f"beta {gate.beta:g}: mean {gate.mean_exit:.2f}", xticks=exits)
    np.atleast_1d(axes)[0].set_ylabel("images, %")
    np.atleast_1d(axes)[0].legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)
