"""Plots of quality over cost and of the exits taken."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..derived.dataset import DerivedDataset
from ..files import atomic_write
from .results import PARENT, STEP_A, TARGETS, Result

DPI = 120


def plot_quality(results: Sequence[Result], kind: type, path: Path) -> None:
    """Quality over the encoder's cost: forced exits with and without Step A, the gates, the exit targets."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = (
        (PARENT, "fixed", "o--", "tab:gray", "forced exits, without Step A"),
        (STEP_A, "fixed", "o-", "tab:blue", "forced exits, after Step A"),
        (STEP_A, "gate", "D", "tab:red", "gates"),
        (TARGETS, "oracle", "^:", "tab:green", "exit targets of Eq. 5 (upper bound)"),
    )
    full = max(r.row.encoder_gflops for r in results)
    for model, policy, style, color, label in styles:
        rows = [r.row for r in results if r.model == model and r.row.policy == policy]
        axes.plot([r.encoder_gflops for r in rows], [r.score for r in rows], style, color=color, label=label)
        shift, last = 0, -1.0
        for r in rows:  # points of different betas may coincide: their labels stand above each other
            shift = shift + 9 if abs(r.encoder_gflops - last) < 0.04 * full else 0
            text, last = str(r.max_exit) if policy == "fixed" else f"{r.beta:g}", r.encoder_gflops
            offset = (4, -12 - shift if policy == "gate" else 4 + shift)
            axes.annotate(text, (last, r.score), offset, textcoords="offset points", fontsize=8, color=color)
    axes.margins(y=0.15)
    title = next(iter(kind.columns.values()))
    axes.set(xlabel="encoder GFLOPs per image", ylabel=title, title="Quality and cost (numbers: exit or beta)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


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
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)
