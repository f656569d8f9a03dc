"""The files in configs/ and the keys of this project."""

from pathlib import Path

from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from minis import CONFIGS

from eco_m2f.config import add_eco_config, leaves

ALL = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


LEAVES = [name for name in ALL if not Path(name).name.startswith("Base-")]


PAPER = [name for name in LEAVES if "/panoptic-segmentation/" in name]


def own_keys() -> set[str]:
    """The keys that add_eco_config adds to detectron2's and DeepLab's."""
    base, ours = get_cfg(), get_cfg()
    add_deeplab_config(base)
    add_eco_config(ours)
    return set(leaves(ours)) - set(leaves(base))
