"""A small panoptic dataset on disk, registered with detectron2, and predictions for it."""

import json

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 41, "name": "sky", "isthing": 0},
    {"id": 90, "name": "grass", "isthing": 0},
]
CONTIGUOUS = {c["id"]: i for i, c in enumerate(CATEGORIES)}


def make_image(rng, size=(48, 64)):
    """Stuff above and below, a band of void, and things, of which the last is a crowd."""
    id_map = np.zeros(size, dtype=np.int64)
    id_map[:20], id_map[24:] = 70_001, 70_002
    segments = [{"id": 70_001, "category_id": 41, "iscrowd": 0}, {"id": 70_002, "category_id": 90, "iscrowd": 0}]
    for i in range(4):
        y, x = rng.integers(0, 30), 16 * i
        category = int(rng.choice([3, 7]))
        id_map[y : y + 14, x : x + 13] = 500 * (i + 1)
        segments.append({"id": 500 * (i + 1), "category_id": category, "iscrowd": int(i == 3)})
    for s in segments:
        s["area"] = int((id_map == s["id"]).sum())
    return id_map, segments


def write_dataset(root, num_images=5, seed=0):
    rng = np.random.default_rng(seed)
    (root / "panoptic").mkdir(parents=True)
    annotations, images = [], []
    for image_id in range(100, 100 + num_images):
        id_map, segments = make_image(rng)
        rgb = np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "panoptic" / f"{image_id}.png")
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": 48, "width": 64})
    (root / "panoptic.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    return annotations


def register(name, root, **metadata):
    """Registers metadata only: evaluators do not load images. Call `unregister` afterwards."""
    if name in DatasetCatalog:
        unregister(name)
    DatasetCatalog.register(name, lambda: [{"image_id": i} for i in range(100, 105)])
    return MetadataCatalog.get(name).set(
        **{
            "panoptic_json": str(root / "panoptic.json"),
            "panoptic_root": str(root / "panoptic"),
            "thing_dataset_id_to_contiguous_id": {c["id"]: CONTIGUOUS[c["id"]] for c in CATEGORIES if c["isthing"]},
            "stuff_dataset_id_to_contiguous_id": {c["id"]: CONTIGUOUS[c["id"]] for c in CATEGORIES if not c["isthing"]},
            "thing_classes": [c["name"] for c in CATEGORIES if c["isthing"]],
            "stuff_classes": [c["name"] for c in CATEGORIES],
            "evaluator_type": "coco_panoptic_seg",
            "ignore_label": 255,
            **metadata,
        }
    )


def unregister(name):
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def make_output(id_map, segments, seed):
    """A model's output for an image: the ground truth with a few mistakes."""
    rng = np.random.default_rng(seed)
    pred_map, pred_segments = np.zeros(id_map.shape, dtype=np.int32), []
    for s in segments:
        mask = np.roll(id_map == s["id"], rng.integers(-4, 5), axis=int(rng.integers(0, 2)))
        if not mask.any() or rng.random() < 0.1:
            continue
        category = CONTIGUOUS[s["category_id"]] if rng.random() < 0.85 else int(rng.integers(0, 4))
        pred_map[mask] = len(pred_segments) + 1
        pred_segments.append({"id": len(pred_segments) + 1, "isthing": category < 2, "category_id": category})
    visible = set(np.unique(pred_map).tolist())
    pred_segments = [s for s in pred_segments if s["id"] in visible]
    sem_seg = torch.as_tensor(rng.random((4, *id_map.shape)), dtype=torch.float32)
    for s in pred_segments:
        sem_seg[s["category_id"]] += torch.as_tensor(pred_map == s["id"]) * 0.8
    things = [s for s in pred_segments if s["isthing"]]
    instances = Instances(id_map.shape)
    instances.pred_masks = torch.zeros(len(things), *id_map.shape)
    for i, s in enumerate(things):
        instances.pred_masks[i] = torch.as_tensor(pred_map == s["id"]).float()
    instances.scores = torch.as_tensor(rng.random(len(things)), dtype=torch.float32)
    instances.pred_classes = torch.tensor([s["category_id"] for s in things], dtype=torch.int64)
    exit_ = int(rng.integers(2, 7))
    return {
        "panoptic_seg": (torch.as_tensor(pred_map), pred_segments),
        "sem_seg": sem_seg,
        "instances": instances,
        "exit": exit_,
    }


def make_outputs(root, annotations):
    inputs, outputs = [], []
    for a in annotations:
        rgb = np.array(Image.open(root / "panoptic" / a["file_name"])).astype(np.int64)
        id_map = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        inputs.append({"image_id": a["image_id"], "image": torch.empty(3, *id_map.shape)})
        outputs.append(make_output(id_map, a["segments_info"], a["image_id"]))
    return inputs, outputs


class LayerCosts:
    """In place of `ExitCosts`: 10 GFLOPs per layer and 1 in the encoder, and a thousandth per pixel."""

    size_divisibility = 32

    def __call__(self, padded, output):
        pixels = (padded[0] * padded[1] + output[0] * output[1]) / 1000
        return {k: {"total": 10.0 * k + pixels, "encoder": 1.0 * k} for k in range(1, 7)}
