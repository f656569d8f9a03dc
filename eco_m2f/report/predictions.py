"""A picture of images, ground truth and predictions."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.data import DatasetCatalog

from ..data.classes import dataset_classes
from ..data.images import read_rgb
from ..data.mappers import PanopticTestMapper
from ..derived.dataset import DerivedDataset
from ..engine.predict import build_trained
from ..engine.setup import load_cfg
from ..evaluation.boxes import BoxGroundTruth
from ..evaluation.ground_truth import PanopticGroundTruth
from ..evaluation.panoptic_quality import to_dataset_categories
from ..gates.gate import Gate
from .draw import draw_boxes, draw_panoptic
from .plots import _save

DRAWN_SCORE = 0.5  # below it a detection is not drawn


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
