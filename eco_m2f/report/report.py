"""Writes the report of a recipe's run into its folder."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from ..derived.dataset import DerivedDataset
from ..files import atomic_write
from ..gates.gate import Gate
from .plots import plot_exits, plot_quality
from .predictions import plot_predictions
from .results import collect
from .table import _write_csv, markdown, provenance


def write_report(folder: str | Path) -> Path:
    """Writes table.csv, table.md, exits.png, predictions.png and pq_gflops.png into a recipe's folder.

    Where the quality is another than PQ, the last has its name.

    The folder holds derived/parent_val, derived/val, gates/*.safetensors (or .pth) and eval/<name of a gate>, as
    tools/recipe.py leaves them. Returns the path of table.md. Raises FileNotFoundError for what is missing.
    """
    folder = Path(folder)
    parent = DerivedDataset.load(folder / "derived" / "parent_val", with_features=False)
    val = DerivedDataset.load(folder / "derived" / "val")
    files = (p for p in (folder / "gates").glob("*") if p.suffix in (".safetensors", ".pth"))
    found = ((p.stem, Gate.load(p)) for p in files)
    gates = dict(sorted(found, key=lambda pair: pair[1].beta))
    if not gates:
        raise FileNotFoundError(f"no gates in {folder / 'gates'}: let tools/recipe.py come to its end")
    results = collect(folder, parent, val, gates)
    _write_csv(results, folder / "table.csv")
    with atomic_write(folder / "table.md", "w") as file:
        file.write("\n".join([*markdown(results, val.quality_kind), "", *provenance(folder, parent, val), ""]))
    plot_quality(results, val.quality_kind, folder / f"{val.quality_name.lower()}_gflops.png")
    plot_exits(results, val, folder / "exits.png")
    name, middle = list(gates.items())[len(gates) // 2]
    plot_predictions(folder / "eval" / name, middle, val, folder / "predictions.png")
    return folder / "table.md"
