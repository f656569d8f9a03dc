"""What a recipe found: one table and three pictures, from the derived datasets, the gates and the evaluations.

For boxes the mean over the images of each one's AP takes the place of PQ, and the AP of the dataset, which is no sum
over images, is told where the whole model was evaluated.

Every PQ of a forced exit is a sum over a derived dataset; that of a gate is so too, and stands beside the one that the
whole model reached when it was evaluated, image by image, with this gate.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.data import DatasetCatalog

from . import __version__
from .budget import Row, fixed_rows, measure, oracle_row
from .data import PanopticTestMapper
from .data.classes import dataset_classes
from .data.images import read_rgb
from .derived import DerivedDataset
from .engine import build_trained, load_cfg
from .evaluation.boxes import BoxGroundTruth
from .evaluation.ground_truth import PanopticGroundTruth
from .evaluation.panoptic_quality import to_dataset_categories
from .files import atomic_write, write_csv
from .gate import Gate
from .visualization import draw_boxes, draw_panoptic

PARENT, STEP_A, TARGETS = "parent, no Step A", "after Step A", "after Step A, targets of Eq. 5"
DPI = 120
DRAWN_SCORE = 0.5  # below it a detection is not drawn


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


def write_report(folder: str | Path) -> Path:
    """Writes table.csv, table.md, pq_gflops.png (ap_gflops.png), exits.png and predictions.png into a recipe's folder.

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
        file.write("\n".join([*markdown(results, val.measure), "", *provenance(folder, parent, val), ""]))
    plot_quality(results, val.measure, folder / f"{val.measure.lower()}_gflops.png")
    plot_exits(results, val, folder / "exits.png")
    name, middle = list(gates.items())[len(gates) // 2]
    plot_predictions(folder / "eval" / name, middle, val, folder / "predictions.png")
    return folder / "table.md"


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


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result], measure: str = "PQ") -> list[str]:
    """The table's lines. "of full" is the part of the encoder's cost at the last exit."""
    quality = ("PQ", "PQ things", "PQ stuff", "evaluated PQ")
    if measure != "PQ":
        quality = ("mean AP of an image", "evaluated mean AP", "AP of the dataset")
    head = ("model", "images leave", *quality, "mean exit", "GFLOPs", "encoder GFLOPs", "of full", "images per exit")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    full = max(result.row.encoder_gflops for result in results)
    for result in results:
        row = result.row
        points = (row.pq, row.pq_things, row.pq_stuff, result.evaluated)
        if measure != "PQ":
            points = (row.quality, result.evaluated, result.dataset_ap)
        cells = [result.model, result.leaves, *("" if v is None else f"{v:.2f}" for v in points)]
        cells += [f"{row.mean_exit:.2f}", f"{row.total_gflops:.4g}", f"{row.encoder_gflops:.4g}"]
        cells += [f"{100 * row.encoder_gflops / full:.0f} %", " ".join(f"{k}:{n}" for k, n in row.images.items() if n)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def provenance(folder: Path, parent: DerivedDataset, val: DerivedDataset) -> list[str]:
    """Lines that say what the numbers were made with: data, weights, commands, times, machine."""
    about = val.provenance
    lines = [
        f"{val.measure} on the {len(val)} images of `{about['dataset']}`; GFLOPs: means over them, in the paper's "
        "convention.",
        "",
        f"Parent {parent.provenance['checkpoint_sha256'][:12]}, after Step A {about['checkpoint_sha256'][:12]}; "
        f"eco_m2f {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads on {_processor()}.",
    ]
    stages = folder / "stages.json"
    if stages.exists():
        done = json.loads(stages.read_text())
        total = sum(stage["seconds"] for stage in done.values()) / 60
        lines += ["", f"Stages, {total:.1f} minutes in all:", ""]
        lines += [
            f"- {name}, {stage['seconds']:.0f} s: `{_portable(stage['command'])}`" for name, stage in done.items()
        ]
    return lines


def _portable(command: str) -> str:
    """A command with paths relative to the working directory."""
    return command.replace(f"{os.getcwd()}/", "")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _write_csv(results: Sequence[Result], path: Path) -> None:
    boxes = any(r.dataset_ap is not None for r in results)
    rows = [{"model": r.model, "leaves": r.leaves, **r.row.numbers(), **_evaluated_columns(r, boxes)} for r in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, rows, names)


def _evaluated_columns(result: Result, boxes: bool) -> dict:
    if boxes:
        return {"evaluated_ap": result.evaluated, "dataset_ap": result.dataset_ap}
    return {"evaluated_pq": result.evaluated}


# --- the pictures ----------------------------------------------------------------------------------------------------


def plot_quality(results: Sequence[Result], measure: str, path: Path) -> None:
    """PQ (or mean AP) over the encoder's cost: forced exits with and without Step A, the gates, and the targets."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = (
        (PARENT, "fixed", "o--", "tab:gray", "forced exits, without Step A"),
        (STEP_A, "fixed", "o-", "tab:blue", "forced exits, after Step A"),
        (STEP_A, "gate", "D", "tab:red", "gates"),
        (TARGETS, "oracle", "^:", "tab:green", "targets of Eq. 5 (upper bound)"),
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
    label = measure if measure == "PQ" else f"mean {measure} of an image"
    axes.set(xlabel="encoder GFLOPs per image", ylabel=label, title="Quality and cost (numbers: exit or beta)")
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
        ax.bar(exits + 0.2, share, 0.4, label="target", color="tab:green")
        ax.set(xlabel="exit", title=f"beta {gate.beta:g}: mean {gate.mean_exit:.2f}", xticks=exits)
    np.atleast_1d(axes)[0].set_ylabel("images, %")
    np.atleast_1d(axes)[0].legend()
    _save(figure, path)


def plot_predictions(evaluation: Path, gate: Gate, val: DerivedDataset, path: Path, columns: int = 6) -> None:
    """Images, truth, and what the model that was evaluated with this gate makes of them; the exits stand above."""
    cfg = load_cfg(str(evaluation / "config.yaml"))
    model = build_trained(cfg)
    truth = model.measure.of(val.provenance["dataset"]).truth
    records, mapper = {str(r["image_id"]): r for r in DatasetCatalog.get(truth.name)}, PanopticTestMapper(cfg)
    chosen = gate.choose(torch.from_numpy(val.features)).numpy()
    figure, axes = plt.subplots(3, columns, figsize=(2 * columns, 6.6), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for column, i in zip(axes.T, _examples(chosen, val, columns)):
        image, panels, k = _predict(model, mapper, truth, records[val.image_ids[i]])
        for ax, panel in zip(column, (image, *panels)):
            ax.imshow(panel)
        q = val.quality[i, val.exits.index(k)]
        column[0].set_title(f"exit {k}, {val.measure} {100 * q:.0f}", fontsize=10)
    for ax, label in zip(axes[:, 0], ("image", "truth", "prediction")):
        ax.text(-0.06, 0.5, label, rotation=90, va="center", ha="right", transform=ax.transAxes)
    _save(figure, path)


def _examples(chosen: np.ndarray, val: DerivedDataset, count: int) -> list[int]:
    """Images spread over the exits chosen: of each exit in turn the one nearest to its median quality, ascending."""
    queues = []
    for k in np.unique(chosen):
        rows = np.flatnonzero(chosen == k)
        quality = val.quality[rows, val.exits.index(k)]
        queues.append(rows[np.argsort(np.abs(quality - np.median(quality)), kind="stable")].tolist())
    picked = []
    while len(picked) < min(count, len(chosen)):
        queues = [queue for queue in queues if queue]
        picked += [queue.pop(0) for queue in queues][: count - len(picked)]
    return sorted(picked, key=lambda i: (chosen[i], i))


def _predict(
    model, mapper, truth: PanopticGroundTruth | BoxGroundTruth, record: dict
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """The image of a dataset's record, the pictures of truth and prediction, and the exit taken."""
    image = read_rgb(record["file_name"])
    with torch.no_grad():
        output = model([mapper(record)])[0]
    draw = _draw_panoptic if isinstance(truth, PanopticGroundTruth) else _draw_boxes
    return image, draw(image, truth, record["image_id"], output), output["exit"]


def _draw_panoptic(image: np.ndarray, truth: PanopticGroundTruth, image_id, output: dict) -> list[np.ndarray]:
    colors = _colors(truth)
    id_map, segments = output["panoptic_seg"]
    real = draw_panoptic(image, truth.id_map(image_id), truth.segments(image_id), colors)
    drawn = draw_panoptic(image, id_map.cpu().numpy(), to_dataset_categories(segments, truth.dataset_id), colors)
    return [real, drawn]


def _draw_boxes(image: np.ndarray, truth: BoxGroundTruth, image_id, output: dict) -> list[np.ndarray]:
    instances = output["instances"].to("cpu")
    confident = truth.detections(image_id, instances[instances.scores >= DRAWN_SCORE])
    return [draw_boxes(image, objects, _colors(truth)) for objects in (truth.objects(image_id), confident)]


def _colors(truth: PanopticGroundTruth | BoxGroundTruth) -> dict[int, tuple]:
    return {c["id"]: tuple(c["color"]) for c in dataset_classes(truth.name)}


def _save(figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)
