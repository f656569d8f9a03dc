"""Small datasets annotated with a model's predictions, so that random weights have a PQ, or AP, above 0."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from minis import fill
from PIL import Image
from tiny import Tiny

from eco_m2f.data.mappers import PanopticTestMapper
from eco_m2f.data.panoptic_map import ids_to_rgb
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.quality import BoxAP, PanopticQuality
from eco_m2f.quality.panoptic_quality import to_dataset_categories

OPTIONS = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0, "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0]
BOXES_PER_IMAGE = 4


def opinionated(model):
    """Random weights with predictions that differ by query, have several classes, and change little by exit."""
    fill(model)
    with torch.no_grad():
        (_opinionated_boxes if model.annotation == "boxes" else _opinionated_masks)(model.head)
    return model.eval()


def _opinionated_boxes(head) -> None:
    head.class_embed.weight.mul_(4)
    head.class_embed.bias.zero_()
    head.bbox_embed.layers[2].weight.mul_(2)


def _opinionated_masks(head) -> None:
    head.predictor.class_embed.weight.mul_(3)
    head.predictor.class_embed.bias.zero_()[-1] = -3.0  # hardly ever "no object"
    head.pixel_decoder.mask_features.bias.zero_()
    for name, value in head.pixel_decoder.transformer.named_parameters():
        if "norm" in name:
            value.fill_(float(name.endswith("weight")))
        elif "output_proj" in name or "linear2" in name:
            value.mul_(0.1)


class Split:
    """The mapped images of a split, and a model's predictions for them at an exit."""

    def __init__(self, tiny: Tiny, split: str, cfg, model):
        self.tiny, self.split, self.cfg, self.model = tiny, split, cfg, model
        self.dataset = tiny.dataset(split, model.annotation == "boxes")

    def inputs(self) -> list[dict]:
        mapper = PanopticTestMapper(self.cfg)
        return [mapper(record) for record in DatasetCatalog.get(self.dataset)]

    def predict(self, x: dict, k: int) -> tuple[np.ndarray, list[dict]] | list[dict]:
        """The prediction for quality of a mapped image at exit k, in the ids of the dataset's categories.

        A panoptic map and its segments, or detections.
        """
        images = self.model.preprocess([x])
        with torch.no_grad():
            pred = self.model.head.forward_exits(self.model.extract(images), [k])[k]
            quality = (BoxAP if self.model.annotation == "boxes" else PanopticQuality).of(self.dataset)
            found = quality.prepare(self.model, pred, images, x)
        if self.model.annotation == "boxes":
            return [{"image_id": x["image_id"], **d} for d in found.detections(quality.truth.dataset_id)]
        categories = json.loads(self.tiny.json(self.split).read_text())["categories"]
        return found[0].astype(np.int32), to_dataset_categories(found[1], dict(enumerate(c["id"] for c in categories)))

    def annotate(self, exits: Sequence[int]) -> None:
        """Annotates image i with the prediction at exits[i % len(exits)], changed a little. With boxes the last image
        has no objects."""
        boxes = self.model.annotation == "boxes"
        path = self.tiny.json(self.split, "detection" if boxes else "panoptic")
        content, found = json.loads(path.read_text()), []
        for i, x in enumerate(self.inputs()):
            found.append((x, self.predict(x, exits[i % len(exits)])))
        content["annotations"] = list((_objects if boxes else _segments)(found, content))
        path.write_text(json.dumps(content))


def _objects(found: list, content: dict) -> Iterator[dict]:
    best = [d for _, detections in found[:-1] for d in detections[:BOXES_PER_IMAGE]]
    for i, d in enumerate(best, start=1):
        row = {key: d[key] for key in ("image_id", "category_id", "bbox")}
        yield {"id": i, **row, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}


def _segments(found: list, content: dict) -> Iterator[dict]:
    """Also writes the PNGs."""
    annotations = {a["image_id"]: a for a in content["annotations"]}
    for i, (x, (panoptic, segments)) in enumerate(found):
        panoptic[:, : 8 + i] = 0
        areas = dict(zip(*(v.tolist() for v in np.unique(panoptic, return_counts=True))))
        kept = [
            {"id": s["id"], "category_id": s["category_id"], "iscrowd": 0, "area": areas[s["id"]]}
            for s in segments
            if s["id"] in areas
        ]
        Image.fromarray(ids_to_rgb(panoptic)).save(x["pan_seg_file_name"])
        yield {**annotations[x["image_id"]], "segments_info": kept}


class Predicted(Split):
    """A training split annotated by a model with distinct predictions. The folder also has its checkpoint."""

    def __init__(self, base: Path, num_images: int, kind: str = "eco_maskformer2"):
        tiny = Tiny(base, num_train=num_images, num_val=1)
        self.kind, self.weights = kind, base / "model.pth"
        self.options = ["MODEL.WEIGHTS", str(self.weights), *OPTIONS]
        cfg = load_cfg(tiny.config(kind), self.options)
        super().__init__(tiny, "train", cfg, opinionated(build_model(cfg)))
        torch.save({"model": self.model.state_dict()}, self.weights)
        self.annotate(self.model.exits)
