"""What a recipe's run measured: forced exits, gates and exit targets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch

from ..derived.dataset import DerivedDataset
from ..gates.frontier import Row, fixed_rows, measure, oracle_row
from ..gates.gate import Gate

PARENT, STEP_A, TARGETS = "parent, no Step A", "after Step A", "after Step A, targets of Eq. 5"


@dataclass
class Result:
    """A row of the table: a model, the way it leaves, and what was measured.

    evaluated: PQ, or the mean of the images' AP, by the whole model; dataset_ap: the AP of boxes by the whole model.
    """

    model: str
    leaves: str
    row: Row
    evaluated: float | None = None
    dataset_ap: float | None = None


def collect(folder: Path, parent: DerivedDataset, val: DerivedDataset, gates: Mapping[str, Gate]) -> list[Result]:
    """All results of a run, in the order of the table; gates by the name that each was evaluated under."""
    results = [Result(PARENT, f"all at {row.max_exit}", row) for row in fixed_rows(parent)]
    for row in fixed_rows(val):
        whole = evaluated(folder / "eval" / "full", val.measure) if row.max_exit == val.exits[-1] else ()
        results.append(Result(STEP_A, f"all at {row.max_exit}", row, *whole))
    features = torch.from_numpy(val.features)
    for name, gate in gates.items():
        about = {"policy": "gate", "beta": gate.beta, "max_exit": gate.max_exit, "loss": gate.loss}
        row = measure(val, gate.choose(features), **about)
        whole = evaluated(folder / "eval" / name, val.measure)
        results.append(Result(STEP_A, f"gate, beta {gate.beta:g}", row, *whole))
    for gate in gates.values():
        results.append(Result(TARGETS, f"beta {gate.beta:g}", oracle_row(val, gate.beta, gate.max_exit)))
    return results


def evaluated(folder: Path, measure: str) -> tuple[float, ...]:
    """What an evaluation by train_net.py found, in points: (PQ,), or (mean AP of an image, AP of the dataset)."""
    return (evaluated_pq(folder),) if measure == "PQ" else evaluated_ap(folder)


def evaluated_pq(folder: Path) -> float:
    """PQ in points of an evaluation by train_net.py. Raises FileNotFoundError where there is none."""
    return 100 * _evaluation(folder, "panoptic.json")["All"]["pq"]


def evaluated_ap(folder: Path) -> tuple[float, float]:
    """Mean AP of an image and AP of the dataset, in points. Raises FileNotFoundError where there is none."""
    found = _evaluation(folder, "boxes.json")
    return 100 * found["AP_image"], 100 * found["AP"]


def _evaluation(folder: Path, name: str) -> dict:
    found = sorted(folder.glob(f"inference/*/{name}"))
    if not found:
        raise FileNotFoundError(f"no evaluation in {folder}: run train_net.py --eval-only with OUTPUT_DIR {folder}")
    return json.loads(found[0].read_text())
