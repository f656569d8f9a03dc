"""Images of a run beside ground truth and prediction, as pictures."""

from dataclasses import dataclass
from pathlib import Path

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

DRAWN_SCORE = 0.5  # below it a detection is not drawn


@dataclass(frozen=True)
class Example:
    """An image, its ground truth and its prediction as pictures [H, W, 3], with a title."""

    title: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def predict_examples(evaluation: Path, gate: Gate, val: DerivedDataset, count: int = 6) -> list[Example]:
    """Images of a split and what the model predicts for them, spread over the exits that the gate chooses.

    evaluation: output folder of train_net.py --eval-only with this gate, which holds the config.
    """
    cfg = load_cfg(str(evaluation / "config.yaml"))
    model = build_trained(cfg)
    truth = _ground_truth(model.annotation, val.provenance["dataset"])
    records, mapper = {str(r["image_id"]): r for r in DatasetCatalog.get(truth.name)}, PanopticTestMapper(cfg)
    chosen = gate.choose(torch.from_numpy(val.features)).numpy()
    found = []
    for i in spread_over_exits(chosen, val, count):
        image, panels, k = _predict(model, mapper, truth, records[val.image_ids[i]])
        quality = 100 * val.quality[i, val.exits.index(k)]
        found.append(Example(f"exit {k}, {val.quality_name} {quality:.0f}", image, *panels))
    return found


def spread_over_exits(chosen: np.ndarray, val: DerivedDataset, count: int) -> list[int]:
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
