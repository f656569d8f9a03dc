"""Toy images for tests of qualities, and right or wrong outputs of a head for them."""

import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from PIL import Image
from predicted import Predicted
from tiny import Tiny, call
from torchvision.ops import box_convert

from eco_m2f.data.mappers import PanopticTestMapper
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.derive import derive
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.gates.frontier import GateFitter
from eco_m2f.quality.ground_truth import BoxGroundTruth, PanopticGroundTruth
from eco_m2f.report.report import write_report

SURE = 10.0  # a logit
SHIFT = 3  # pixels that a noisy prediction is off by


class Case:
    """A quality on the images of a toy set. The last image has no annotated object."""

    def __init__(self, kind: type, base: Path):
        self.kind, self.boxes = kind, kind.annotation == "boxes"
        self.tiny = Tiny(base, num_train=4, num_val=1)
        self.cfg = load_cfg(self.tiny.config("eco_detr" if self.boxes else "eco_maskformer2"))
        self.model = build_model(self.cfg).eval()
        self.dataset = self.tiny.dataset("train", self.boxes)
        self._empty_the_last_image()
        self.quality = kind.of(self.dataset)
        self.truth = BoxGroundTruth(self.dataset) if self.boxes else PanopticGroundTruth(self.dataset)

    @cached_property
    def inputs(self) -> list[dict]:
        mapper = PanopticTestMapper(self.cfg)
        return [mapper(record) for record in DatasetCatalog.get(self.dataset)]

    @property
    def shown(self) -> list[dict]:
        """The images with objects."""
        return self.inputs[:-1]

    def head_says(self, x: dict, how: str) -> dict:
        """A head's output for x: "right", "noisy", "nothing", or "wrong": a class everywhere that does not occur."""
        labels, shapes = self.annotated(x)
        if how == "noisy":
            labels = [(c + (i == 0)) % self._classes for i, c in enumerate(labels)]
            shapes = shapes * 0.9 if self.boxes else shapes.roll((SHIFT, SHIFT), dims=(1, 2))
        if how == "wrong":
            labels, shapes = [next(c for c in range(self._classes) if c not in labels)], self._everything(x)
        if how == "nothing":
            labels, shapes = [], shapes[:0]
        logits = torch.zeros(1, len(labels) + 1, self._classes + 1)
        logits[0, torch.arange(len(labels) + 1), torch.tensor([*labels, self._classes])] = SURE
        if self.boxes:
            return {"pred_logits": logits, "pred_boxes": torch.cat([shapes, torch.full((1, 4), 0.5)])[None]}
        masks = torch.cat([shapes, torch.zeros(1, *shapes.shape[1:], dtype=torch.bool)])
        return {"pred_logits": logits, "pred_masks": torch.where(masks, SURE, -SURE)[None]}

    def prepared(self, x: dict, how: str):
        with torch.no_grad():
            return self.quality.prepare(self.model, self.head_says(x, how), self.model.preprocess([x]), x)

    def compared(self, x: dict, *hows: str) -> list[tuple]:
        return self.quality.comparison(x)([self.prepared(x, how) for how in hows])

    @property
    def _classes(self) -> int:
        return len(self.truth.dataset_id)

    def annotated(self, x: dict) -> tuple[list[int], torch.Tensor]:
        """Contiguous classes, and masks [G, H, W], or boxes [G, 4] in parts of the image."""
        contiguous = {dataset: c for c, dataset in self.truth.dataset_id.items()}
        if self.boxes:
            objects = self.truth.objects(x["image_id"])
            boxes = torch.tensor([o["bbox"] for o in objects]).reshape(-1, 4)
            size = torch.tensor([x["width"], x["height"]] * 2)
            return [contiguous[o["category_id"]] for o in objects], box_convert(boxes, "xywh", "cxcywh") / size
        image = self.truth.image(x["image_id"])
        ids = torch.from_numpy(image.id_map())  # [H, W]
        listed = torch.tensor([s["id"] for s in image.segments], dtype=ids.dtype)
        return [contiguous[s["category_id"]] for s in image.segments], ids == listed[:, None, None]

    def _everything(self, x: dict) -> torch.Tensor:
        whole = torch.ones(1, x["height"], x["width"], dtype=torch.bool)
        return torch.tensor([[0.5, 0.5, 1.0, 1.0]]) if self.boxes else whole

    def _empty_the_last_image(self) -> None:
        path = self.tiny.json("train", "detection" if self.boxes else "panoptic")
        content = json.loads(path.read_text())
        last = content["images"][-1]["id"]
        if self.boxes:
            content["annotations"] = [o for o in content["annotations"] if o["image_id"] != last]
        else:
            annotation = next(a for a in content["annotations"] if a["image_id"] == last)
            annotation["segments_info"] = []
            png = self.tiny.base / "data" / "panoptic_train" / annotation["file_name"]
            Image.fromarray(np.zeros_like(np.array(Image.open(png)))).save(png)
        path.write_text(json.dumps(content))


def whole_way(key: str, kind: type, base: Path) -> tuple[DerivedDataset, Path]:
    """Step B with a quality, a gate, evaluations, and the report. Returns derived dataset and folder of the report."""
    config = "eco_detr" if kind.annotation == "boxes" else "eco_maskformer2"
    predicted, run = Predicted(base, 6, config), base / "run"
    options = [*predicted.options, "MODEL.ECO.QUALITY", key]
    cfg = load_cfg(predicted.tiny.config(config), options)
    derive(cfg, predicted.model, predicted.dataset, str(run / "derived" / "val"), shard_size=4)
    shutil.copytree(run / "derived" / "val", run / "derived" / "parent_val")
    derived = DerivedDataset.load(run / "derived" / "val")
    row = GateFitter(derived, derived, l2=1e-6).fit(1e-6, 6)
    (run / "gates").mkdir()
    row.gate.save(run / "gates" / "gate.safetensors")
    gated = ["MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", run / "gates" / "gate.safetensors"]
    for name, more in (("full", ()), ("gate", gated)):
        words = ["--config-file", predicted.tiny.config(config), "--eval-only", *options, *more]
        words += ["DATASETS.TEST", f"('{predicted.dataset}',)", "OUTPUT_DIR", run / "eval" / name]
        assert call("train_net", *words) == 0
    write_report(run)
    return derived, run
