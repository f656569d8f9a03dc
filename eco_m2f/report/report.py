"""Writes the report of a recipe's run into its folder."""

from pathlib import Path

from ..derived.dataset import DerivedDataset
from ..files import atomic_write
from ..gates.gate import Gate
from ..gates.verdict import verdict
from .plots import plot_exits, plot_overview, plot_predictions, plot_quality
from .predictions import predict_examples
from .results import collect
from .table import markdown, provenance, write_table


def write_report(folder: str | Path) -> Path:
    """Writes the report of a run into its folder, and returns the path of table.md.

    Files: table.md, table.csv, <quality>_gflops.png, exits.png, predictions.png and overview.png. The folder holds
    derived/parent_val, derived/val, gates/*.safetensors (or .pth) and eval/<name of a gate>, as tools/recipe.py leaves
    them. Raises FileNotFoundError for what is missing.
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
    write_table(results, folder / "table.csv")
    verdicts = verdict([result.row for result in results], val.quality_name)
    lines = [*markdown(results, val.quality_kind), "", *(f"- {line}" for line in verdicts), ""]
    with atomic_write(folder / "table.md", "w") as file:
        file.write("\n".join([*lines, *provenance(folder, parent, val), ""]))
    plot_quality(results, val.quality_kind, folder / f"{val.quality_name.lower()}_gflops.png")
    plot_exits(results, val, folder / "exits.png")
    name, middle = list(gates.items())[len(gates) // 2]
    examples = predict_examples(folder / "eval" / name, middle, val)
    plot_predictions(examples, folder / "predictions.png")
    plot_overview(results, val.quality_kind, examples[:: max(1, len(examples) // 3)][:3], folder / "overview.png")
    return folder / "table.md"
