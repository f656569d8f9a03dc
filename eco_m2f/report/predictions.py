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
from ..gates.gate import Gate
from ..quality.boxes import to_detections
from ..quality.ground_truth import BoxGroundTruth, ClassMaps, PanopticGroundTruth, class_maps_of
from ..quality.panoptic_quality import to_dataset_categories
from .draw import draw_boxes, draw_panoptic
from .plots import _save

DRAWN_SCORE = 0.5  # below it a detection is not drawn


def plot_predictions(evaluation: Path, gate: Gate, val: DerivedDataset, path: Path, columns: int = 6) -> None:
    """Images, ground truth, and what the model that was evaluated with this gate predicts; the exits stand above."""
    cfg = load_cfg(str(evaluation / "config.yaml"))
    model = build_trained(cfg)
    truth = _ground_truth(model.annotation, val.provenance["dataset"])
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
        column[0].set_title(f"exit {k}, {val.quality_name} {100 * q:.0f}", fontsize=10)
    for ax, label in zip(axes[:, 0], ("image", "ground truth", "prediction")):
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


def _ground_truth(annotation: str, dataset_name: str) -> ClassMaps | BoxGroundTruth:
    return BoxGroundTruth(dataset_name) if annotation == "boxes" else class_maps_of(dataset_name)


def _predict(
    model, mapper, truth: ClassMaps | BoxGroundTruth, record: dict
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """The image of a dataset's record, the pictures of ground truth and prediction, and the exit taken."""
    image = read_rgb(record["file_name"])
    with torch.no_grad():
        output = model([mapper(record)])[0]
    if isinstance(truth, BoxGroundTruth):
        draw = _draw_boxes
    else:
        panoptic = isinstance(truth, PanopticGroundTruth) and "panoptic_seg" in output
        draw = _draw_panoptic if panoptic else _draw_classes
    return image, draw(image, truth, record, output), output["exit"]


def _draw_panoptic(image: np.ndarray, truth: PanopticGroundTruth, record: dict, output: dict) -> list[np.ndarray]:
    colors, real = _colors(truth), truth.image(record["image_id"])
    id_map, segments = output["panoptic_seg"]
    drawn = draw_panoptic(image, id_map.cpu().numpy(), to_dataset_categories(segments, truth.dataset_id), colors)
    return [draw_panoptic(image, real.id_map(), real.segments, colors), drawn]


def _draw_classes(image: np.ndarray, truth: ClassMaps, record: dict, output: dict) -> list[np.ndarray]:
    """Class maps, where there are no segments: of a dataset without them, or a model that makes none."""
    colors = _colors(truth)
    segments = [{"id": i, "category_id": c["id"]} for i, c in enumerate(truth.class_categories, start=1)]
    real, found = truth.class_map_reader(record)(), output["sem_seg"].argmax(dim=0).cpu().numpy()  # [H, W]
    real = np.where(real < len(segments), real, -1)  # ignored pixels stay uncovered
    return [draw_panoptic(image, classes + 1, segments, colors) for classes in (real, found)]


def _draw_boxes(image: np.ndarray, truth: BoxGroundTruth, record: dict, output: dict) -> list[np.ndarray]:
    instances, colors = output["instances"].to("cpu"), _colors(truth)
    confident = to_detections(instances[instances.scores >= DRAWN_SCORE], truth.dataset_id)
    return [draw_boxes(image, objects, colors) for objects in (truth.objects(record["image_id"]), confident)]


def _colors(truth: ClassMaps | BoxGroundTruth) -> dict[int, tuple]:
    return {c["id"]: tuple(c["color"]) for c in dataset_classes(truth.name)}
