"""What a recipe's run measured: forced exits, gates, mixtures of fixed exits, and exit targets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..derived.dataset import DerivedDataset
from ..gates.frontier import Row, beside, fixed_rows, measure, oracle_row
from ..gates.gate import Gate
from ..gates.mixture import Mixtures

PARENT, STEP_A, TARGETS = "parent, no Step A", "after Step A", "after Step A, exit targets of Eq. 5"
MIXTURE = "after Step A, mixture of fixed exits"


@dataclass
class Result:
    """A row of the table: a model, the way it leaves, and what was measured.

    evaluated: {column: points} by the whole model, of the quality's `evaluated_columns`; {} where it was not run.
    """

    model: str
    leaves: str
    row: Row
    evaluated: dict[str, float] = field(default_factory=dict)


def collect(folder: Path, parent: DerivedDataset, val: DerivedDataset, gates: Mapping[str, Gate]) -> list[Result]:
    """All results of a run, in the order of the table; gates by the name that each was evaluated under."""
    results = [Result(PARENT, f"all at {row.max_exit}", row) for row in fixed_rows(parent)]
    for row in fixed_rows(val):
        whole = evaluated(folder / "eval" / "full", val.quality_kind) if row.max_exit == val.exits[-1] else {}
        results.append(Result(STEP_A, f"all at {row.max_exit}", row, whole))
    features, mixtures = torch.from_numpy(val.features), Mixtures(val)
    for name, gate in gates.items():
        about = {"policy": "gate", "beta": gate.beta, "max_exit": gate.max_exit, "loss": gate.loss}
        choice = gate.choose(features).numpy()
        row = measure(val, choice, gain=mixtures.gain(choice), **about)
        whole = evaluated(folder / "eval" / name, val.quality_kind)
        results.append(Result(STEP_A, f"gate, beta {gate.beta:g}", row, whole))
        results.append(Result(MIXTURE, f"cost of gate, beta {gate.beta:g}", beside(mixtures, row)))
    for gate in gates.values():
        results.append(Result(TARGETS, f"beta {gate.beta:g}", oracle_row(val, gate.beta, gate.max_exit, mixtures)))
    return results


def evaluated(folder: Path, kind: type) -> dict[str, float]:
    """What train_net.py found of a quality, see `Result`. Raises FileNotFoundError where it found nothing."""
    found = sorted(folder.glob(f"inference/*/{kind.result_file}"))
    if not found:
        switch = f" {kind.switch} True" if kind.switch else ""
        raise FileNotFoundError(
            f"no {kind.result_file} of an evaluation in {folder}: run train_net.py --eval-only with OUTPUT_DIR "
            f"{folder}{switch}"
        )
    return kind.evaluated(json.loads(found[0].read_text()))
