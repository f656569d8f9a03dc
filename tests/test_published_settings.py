"""Every config has the training settings of its paper, which are in tests/assets/published_settings.yaml."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from minis import CONFIGS

from eco_m2f.engine.setup import load_cfg

TABLE = yaml.safe_load((Path(__file__).parent / "assets" / "published_settings.yaml").read_text())
LEAVES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base-"))
MUST_SAY = {  # by the meta-architecture without Eco: what the table has to say of a config
    "": ["batch", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "INPUT.MIN_SIZE_TEST", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
    + [f"SOLVER.{key}" for key in ("MAX_ITER", "BASE_LR", "BACKBONE_MULTIPLIER", "WEIGHT_DECAY", "LR_SCHEDULER_NAME")]
    + [f"SOLVER.{key}" for key in ("WARMUP_ITERS", "CLIP_GRADIENTS.CLIP_VALUE", "CLIP_GRADIENTS.CLIP_TYPE")],
    "MaskFormer": [f"MODEL.MASK_FORMER.{key}_WEIGHT" for key in ("CLASS", "MASK", "DICE", "NO_OBJECT")]
    + [f"MODEL.MASK_FORMER.TEST.{key}_THRESHOLD" for key in ("OBJECT_MASK", "OVERLAP")]
    + ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"],
    "Detr": [f"MODEL.DETR.{key}_WEIGHT" for key in ("CLASS", "L1", "GIOU", "NO_OBJECT")] + ["MODEL.DETR.ENC_LAYERS"],
    "DoViT": [f"MODEL.DOVIT.{key}" for key in ("THRESHOLD", "DECISION_LAYERS", "AUX_WEIGHT")],
    "Eco": [f"MODEL.ECO.{key}" for key in ("EXITS", "EXITS_PER_STEP", "EXIT", "MAX_EXIT", "ALPHA", "BETA", "POLICY")],
}


def settings_of(name: str) -> dict:
    merged = {}
    for entry in TABLE:
        if any(fnmatch(name, pattern) for pattern in entry["of"]):
            merged |= entry["settings"]
    return merged


def value(cfg, key: str):
    """A value of the config, with lists instead of tuples. "batch" is the number of images per step."""
    if key == "batch":
        return cfg.SOLVER.IMS_PER_BATCH
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


@pytest.mark.parametrize("name", LEAVES)
def test_a_config_has_the_published_settings(name):
    cfg = load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])
    wanted = settings_of(name)
    assert {key: value(cfg, key) for key in wanted} == wanted
    kind = cfg.MODEL.META_ARCHITECTURE
    needed = MUST_SAY[""] + MUST_SAY[kind.removeprefix("Eco")]
    needed += MUST_SAY["Eco"] if kind.startswith("Eco") else []
    needed += ["SOLVER.STEPS"] if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else []
    needed += ["INPUT.IMAGE_SIZE"] if "lsj" in cfg.INPUT.DATASET_MAPPER_NAME else ["INPUT.MIN_SIZE_TRAIN"]
    assert [key for key in needed if key not in wanted] == []


def test_every_entry_is_of_some_config():
    assert [e["of"] for e in TABLE if not any(fnmatch(n, p) for n in LEAVES for p in e["of"])] == []
