"""A small panoptic data set on which a model of random weights has a PQ above 0."""

import json
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from minis import fill
from PIL import Image
from tiny import Tiny

from eco_m2f import engine
from eco_m2f.data import PanopticTestMapper
from eco_m2f.data.panoptic_map import ids_to_rgb
from eco_m2f.evaluation.panoptic_quality import to_dataset_categories

OPTIONS = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0, "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0]


def opinionated(model):
    """Random weights whose predictions have several segments of several classes, and change little between exits."""
    fill(model)
    head = model.sem_seg_head
    with torch.no_grad():
        head.predictor.class_embed.weight.mul_(3)
        head.predictor.class_embed.bias.zero_()[-1] = -3.0  # hardly ever "no object"
        head.pixel_decoder.mask_features.bias.zero_()
        for name, value in head.pixel_decoder.transformer.named_parameters():
            if "norm" in name:
                value.fill_(float(name.endswith("weight")))
            elif "output_proj" in name or "linear2" in name:
                value.mul_(0.1)
    return model.eval()


class Predicted:
    """A data set annotated by what the model predicts, each image at another exit, spoilt a little: PQ is not 0."""

    def __init__(self, base: Path, num_images: int):
        self.tiny = Tiny(base, num_train=num_images, num_val=1)
        self.weights = base / "model.pth"
        self.options = ["MODEL.WEIGHTS", str(self.weights), *OPTIONS]
        self.model = opinionated(engine.build_model(engine.load_cfg(self.tiny.config(), OPTIONS)))
        torch.save({"model": self.model.state_dict()}, self.weights)
        self.cfg = engine.load_cfg(self.tiny.config(), self.options)
        self.dataset = f"{self.tiny.name}_train"
        self._annotate()

    def predict(self, x: dict, k: int) -> tuple[np.ndarray, list[dict]]:
        """Panoptic map and segments, with the ids of the dataset's categories, of a mapped image at exit k."""
        images = self.model.preprocess([x])
        with torch.no_grad():
            pred = self.model.sem_seg_head.forward_exits(self.model.backbone(images.tensor), [k])[k]
            panoptic, segments = self.model.judged(pred, images, x)
        content = json.loads(self.tiny.json("train").read_text())
        return panoptic.astype(np.int32), to_dataset_categories(
            segments, dict(enumerate(c["id"] for c in content["categories"]))
        )

    def inputs(self) -> list[dict]:
        mapper = PanopticTestMapper(self.cfg)
        return [mapper(record) for record in DatasetCatalog.get(self.dataset)]

    def _annotate(self) -> None:
        content = json.loads(self.tiny.json("train").read_text())
        annotations = {a["image_id"]: a for a in content["annotations"]}
        for i, x in enumerate(self.inputs()):
            panoptic, segments = self.predict(x, 2 + i % 5)
            panoptic[:, : 8 + i] = 0
            left = set(np.unique(panoptic).tolist())
            annotation = annotations[x["image_id"]]
            annotation["segments_info"] = [
                {"id": s["id"], "category_id": s["category_id"], "iscrowd": 0, "area": int((panoptic == s["id"]).sum())}
                for s in segments
                if s["id"] in left
            ]
            Image.fromarray(ids_to_rgb(panoptic)).save(x["pan_seg_file_name"])
        self.tiny.json("train").write_text(json.dumps(content))
