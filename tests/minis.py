"""A Mask2Former and a DETR of 0.8 M parameters for tests, with every part of the full models."""

import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PARENT = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
ECO = "coco/panoptic-segmentation/eco/eco_maskformer2_R50_bs16_50ep.yaml"
DETR = "coco/object-detection/detr_R50_bs16_500ep.yaml"
ECO_DETR = "coco/object-detection/eco/eco_detr_R50_bs16_500ep.yaml"
ECO_DETR_DC5 = "coco/object-detection/eco/eco_detr_R50_dc5_bs16_500ep.yaml"
MINI = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32, "MODEL.MASK_FORMER.HIDDEN_DIM", 32),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 12, "MODEL.MASK_FORMER.DEC_LAYERS", 4),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 64, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 128),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.DETR.HIDDEN_DIM", 32, "MODEL.DETR.DIM_FEEDFORWARD", 64, "MODEL.DETR.NUM_OBJECT_QUERIES", 12),
    *("MODEL.DETR.DEC_LAYERS", 3, "MODEL.DETR.DROPOUT", 0.0),
]
_HEAD = "MODEL.SEM_SEG_HEAD."
LITE = (_HEAD + "TRANSFORMER_ENCODER_NAME", "LiteEncoder")
PROSCALE = (_HEAD + "TRANSFORMER_ENCODER_NAME", "ProScaleEncoder", _HEAD + "MASK_BRANCH", "lpe")
RT = (
    *(_HEAD + "TRANSFORMER_ENCODER_NAME", "HybridEncoder", _HEAD + "TRANSFORMER_ENC_LAYERS", 1),
    *(_HEAD + "MASK_BRANCH", "stride8", _HEAD + "COMMON_STRIDE", 8),
    *(_HEAD + "IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
)
MASKFORMER = (
    *(_HEAD + "TRANSFORMER_ENCODER_NAME", "DenseEncoder"),
    *(_HEAD + "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res5"], "MODEL.MASK_FORMER.MASK_LOSS", "focal"),
    *("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
    *("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"),
)


def build(config: str = PARENT, *opts, mini: bool = True) -> torch.nn.Module:
    """A model in eval mode from configs/, shrunk by `mini`."""
    from detectron2.modeling import build_model

    from eco_m2f.engine.setup import load_cfg

    return build_model(load_cfg(str(CONFIGS / config), [*(MINI if mini else ["MODEL.DEVICE", "cpu"]), *opts])).eval()


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that depend only on a parameter's name and shape. None is zero."""
    state = model.state_dict()
    for name, value in state.items():
        if not value.is_floating_point() or name == "criterion.empty_weight":
            continue
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(value.shape)
        if name.endswith("running_var"):
            noise = 1 + 0.2 * np.abs(noise)
        elif value.dim() > 1:
            noise = noise * (1.2 / np.sqrt(value[0].numel()))
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.3 * noise
        state[name] = torch.from_numpy(noise).to(value.dtype)
    model.load_state_dict(state)
    return model


def pixel_decoder_exits(decoder, features: dict, exits) -> dict[int, tuple]:
    """{exit: (mask features, maps coarse to fine)} of a pixel decoder."""
    laterals, maps = decoder.encode(features, exits)
    return {k: (decoder.mask_branch(laterals, maps[k]), maps[k]) for k in maps}


def make_batch(sizes=((64, 96), (60, 80)), num_targets: int = 3) -> list[dict]:
    from detectron2.structures import Boxes, Instances

    rng = np.random.default_rng(7)
    batch = []
    for i, (h, w) in enumerate(sizes):
        instances = Instances((h, w))
        instances.gt_classes = torch.from_numpy(rng.integers(0, 7, num_targets))
        blobs = torch.from_numpy(rng.random((num_targets, 1, 4, 6)))
        up = torch.nn.functional.interpolate(blobs, (h, w), mode="bilinear")[:, 0]
        instances.gt_masks = up.argmax(0)[None] == torch.arange(num_targets)[:, None, None]
        instances.gt_boxes = Boxes(_boxes(i, num_targets) * torch.tensor([w, h, w, h]))
        image = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
        batch.append({"image": image, "instances": instances, "height": h, "width": w, "image_id": i})
    return batch


def _boxes(seed: int, count: int) -> torch.Tensor:
    """Corners in parts of the image, [count, 4]."""
    rng = np.random.default_rng([7, seed])
    centre, half = rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.05, 0.3, (count, 2))
    return torch.from_numpy(np.concatenate([centre - half, centre + half], axis=1)).float()
