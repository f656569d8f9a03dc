"""The models with published costs, without their weights."""

import functools

from minis import CONFIGS
from on_meta import build_on_meta

from eco_m2f.engine.setup import load_cfg

BACKBONES = {
    "swin_t": "swin/maskformer2_swin_tiny_{}.yaml",
    "swin_s": "swin/maskformer2_swin_small_{}.yaml",
    "swin_b": "swin/maskformer2_swin_base_IN21k_384_{}.yaml",
    "r50": "maskformer2_R50_{}.yaml",
}
SCHEDULES = {"cityscapes": "bs16_90k", "coco": "bs16_50ep"}
SIBLINGS = {
    "lite": "lite/lite_maskformer2_{}.yaml",
    "lite eco": "lite/lite_eco_maskformer2_{}.yaml",
    "rt": "rt/rt_maskformer2_{}.yaml",
    "proscale": "proscale/proscale111_maskformer2_{}.yaml",
    "proscale eco": "proscale/proscale333_eco_maskformer2_{}.yaml",
}
LABELS = {"swin_t": "swin_tiny", "swin_s": "swin_small", "swin_b": "swin_base_IN21k_384"}


@functools.cache
def model_of(dataset: str, backbone: str, eco: bool = False):
    name = BACKBONES[backbone].format(SCHEDULES[dataset])
    name = f"eco/eco_{name.removeprefix('swin/')}" if eco else name
    return build_on_meta(load_cfg(str(CONFIGS / dataset / "panoptic-segmentation" / name), ["MODEL.DEVICE", "cpu"]))


@functools.cache
def sibling_of(sibling: str, dataset: str = "cityscapes", backbone: str = "swin_t", *opts):
    name = SIBLINGS[sibling].format(f"{LABELS[backbone]}_{SCHEDULES[dataset]}")
    path = CONFIGS / dataset / "panoptic-segmentation" / name
    return build_on_meta(load_cfg(str(path), ["MODEL.DEVICE", "cpu", *opts]))
