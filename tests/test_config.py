"""The files in configs/: they load, their models build, and they differ in what their names say."""

import functools
import re
from pathlib import Path

import pytest
from config_files import ALL, LEAVES, PAPER
from detectron2.config import CfgNode
from minis import CONFIGS
from on_meta import build_on_meta

from eco_m2f.config import leaves
from eco_m2f.data.batch_size import split_batch
from eco_m2f.engine.datasets import check_number_of_classes
from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling import DoViT, EarlyExits, EcoMaskFormer

DOVIT = [name for name in LEAVES if Path(name).name.startswith("dovit")]


BACKBONES = ("R50", "swin_tiny", "swin_small", "swin_base_IN21k_384")


PARENTS_ENCODER = "MSDeformEncoder"


ENCODERS = {
    "lite": "LiteEncoder",
    "rt": "HybridEncoder",
    "proscale": "ProScaleEncoder",
    "maskformer": "DenseEncoder",
}  # by folder


HEAD = "MODEL.SEM_SEG_HEAD."


SIBLINGS = {  # by folder: the keys in which a parent differs from Mask2Former's, on a machine without a GPU
    "lite": {HEAD + "TRANSFORMER_ENCODER_NAME"},
    "rt": {
        *(HEAD + key for key in ("TRANSFORMER_ENCODER_NAME", "TRANSFORMER_ENC_LAYERS", "MASK_BRANCH", "IN_FEATURES")),
        *(HEAD + "COMMON_STRIDE", "MODEL.SWIN.OUT_FEATURES"),
    },
    "proscale": {
        *(HEAD + key for key in ("TRANSFORMER_ENCODER_NAME", "TRANSFORMER_ENC_LAYERS", "MASK_BRANCH")),
        "MODEL.PROSCALE.STAGES",
    },
    "maskformer": {
        *(HEAD + key for key in ("TRANSFORMER_ENCODER_NAME", "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES")),
        *(f"MODEL.MASK_FORMER.{key}" for key in ("TRANSFORMER_DECODER_NAME", "TRANSFORMER_IN_FEATURE", "DEC_LAYERS")),
        *(f"MODEL.MASK_FORMER.{key}_WEIGHT" for key in ("CLASS", "MASK", "DICE")),
        *(f"MODEL.MASK_FORMER.{key}" for key in ("MASK_LOSS", "DROPOUT")),
    },
}


WIDTHS = {"R50": 256, "swin_tiny": 96, "swin_small": 96, "swin_base_IN21k_384": 128}  # channels of res2


NOT_OF_THE_MODEL = ("WEIGHTS", "ECO.BETA", "ECO.LOSS", "ECO.GATE_SOLVER.")


BLOCKS = {"R50": 16, "swin_tiny": 12, "swin_small": 24, "swin_base_IN21k_384": 24}


@pytest.fixture(scope="module")
def build():
    """Builds each distinct model once, without memory for its weights."""
    models = {}

    def once(cfg):
        key = str(sorted((k, str(v)) for k, v in leaves(cfg.MODEL).items() if not k.startswith(NOT_OF_THE_MODEL)))
        if key not in models:
            models[key] = build_on_meta(cfg)
        return models[key]

    return once


@pytest.mark.parametrize("name", DOVIT)
def test_every_dovit_config_loads_and_its_model_builds(name):
    cfg = load_cfg(str(CONFIGS / name))
    model = build_on_meta(cfg)
    assert isinstance(model, DoViT)
    check_number_of_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    kind = "NaiveHead" if "naive" in name else "MaskTransformerHead"
    assert type(model.head).__name__ == kind == cfg.MODEL.SEM_SEG_HEAD.NAME
    sizes = {"small": (384, 6, 12, [2, 5, 8]), "base": (768, 12, 12, [2, 5, 8]), "large": (1024, 16, 24, [6, 12, 18])}
    for size, wanted in sizes.items():
        if f"vit_{size}" in name:
            vit = model.backbone
            decisions = [stage.start for stage in vit.stages[1:]]
            assert (vit.dim, vit.blocks[0].attn.num_heads, len(vit.blocks), decisions) == wanted
            assert vit.patch_size == 16 and f"vit_{size}_patch16_384" in cfg.MODEL.WEIGHTS
    thresholds = {"cityscapes": 0.985, "ade20k": 0.96}
    assert model.threshold == thresholds.get(Path(name).parts[0], cfg.MODEL.DOVIT.THRESHOLD)
    assert len(model.auxiliary_heads) == 3 and model.weights["loss_aux"] == 0.4


@pytest.mark.parametrize("name", [name for name in ALL if name not in DOVIT])
def test_every_config_loads_and_its_model_builds(name, build):
    cfg = load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])
    if name not in LEAVES:
        assert cfg.VERSION == 2 and cfg.DATASETS.TRAIN
        return
    model = build(cfg)
    check_number_of_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    classes = next(m for n, m in model.named_modules() if n.endswith("class_embed"))
    assert classes.out_features == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES + 1
    assert isinstance(model, EarlyExits) == ("eco" in Path(name).name)
    if "detr" in Path(name).name:
        assert model.head.exits[-1] == cfg.MODEL.DETR.ENC_LAYERS == 6
        return
    assert model.sem_seg_head.exits[-1] == cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS == num_layers(name)
    assert type(model.sem_seg_head.pixel_decoder.transformer).__name__ == ENCODERS.get(method_of(name), PARENTS_ENCODER)
    if isinstance(model, EcoMaskFormer):
        first = {"proscale": 1, "lite": 3}.get(method_of(name), 2)  # of Lite the paper excludes 2
        assert model.exits == tuple(k for k in model.sem_seg_head.exits if k >= first)
        assert model.exit_policy.exits == model.exits[-1:] and cfg.MODEL.ECO.MAX_EXIT == model.exits[-1]
    for backbone in BACKBONES:
        if backbone in name:
            assert model.backbone.output_shape()["res3"].channels == 2 * WIDTHS[backbone]
            assert blocks(model.backbone) == BLOCKS[backbone]


def method_of(name: str) -> str:
    """The folder of a config. For a sibling it is the sibling's name."""
    return Path(name).parent.name


def num_layers(name: str) -> int:
    layers = {"rt_": 1, "proscale111_": 3, "proscale333_": 9}
    return next((n for prefix, n in layers.items() if Path(name).name.startswith(prefix)), 6)


def blocks(backbone) -> int:
    names = (n for n, _ in backbone.named_modules())
    return sum(bool(re.fullmatch(r"res\d\.\d+|layers\.\d\.blocks\.\d+", n)) for n in names)


def test_the_papers_configs_are_there():
    for dataset, schedule in (("coco", "50ep"), ("cityscapes", "90k")):
        for backbone in BACKBONES:
            folder = "" if backbone == "R50" else "swin/"
            base = f"{dataset}/panoptic-segmentation"
            assert f"{base}/{folder}maskformer2_{backbone}_bs16_{schedule}.yaml" in ALL
            assert f"{base}/eco/eco_maskformer2_{backbone}_bs16_{schedule}.yaml" in ALL


def test_the_siblings_configs_are_there():
    """The configs with published results, and their ECO variants if they have exits."""
    backbones = {
        ("coco", "lite/lite{}"): ("swin_tiny", "swin_small"),
        ("cityscapes", "lite/lite{}"): ("swin_tiny", "swin_small", "swin_base_IN21k_384"),
        ("coco", "proscale/proscale333{}"): ("R50", "swin_tiny"),
        ("coco", "proscale/proscale111{}"): ("swin_tiny",),
        ("cityscapes", "proscale/proscale333{}"): ("swin_tiny",),
        ("cityscapes", "proscale/proscale111{}"): ("swin_tiny",),
        ("coco", "rt/rt"): ("swin_tiny",),
        ("cityscapes", "rt/rt"): ("swin_tiny",),
    }
    assert "coco/panoptic-segmentation/maskformer/maskformer_R50_bs16_50ep.yaml" in ALL
    for (dataset, pattern), names in backbones.items():
        schedule = "50ep" if dataset == "coco" else "90k"
        for kind in {pattern.format(""), pattern.format("_eco")}:
            for name in names:
                assert f"{dataset}/panoptic-segmentation/{kind}_maskformer2_{name}_bs16_{schedule}.yaml" in ALL


@pytest.mark.parametrize("name", [n for n in PAPER if method_of(n) in SIBLINGS and "_eco_" not in n])
def test_a_sibling_differs_from_mask2former_in_its_method_alone(name):
    method = method_of(name)
    folder = "" if "_R50_" in name else "swin/"
    parent_name = re.sub(rf"{method}/{method}\d*_(maskformer2_)?", f"{folder}maskformer2_", name)
    device = ["MODEL.DEVICE", "cpu"]
    sibling, parent = (leaves(load_cfg(str(CONFIGS / n), device)) for n in (name, parent_name))
    assert {key for key in sibling if sibling[key] != parent[key]} == SIBLINGS[method] | {"OUTPUT_DIR"}


@pytest.mark.parametrize("name", [name for name in LEAVES if "_bs16_" in name])
@pytest.mark.parametrize("processes, images, passes", [(1, 2, 8), (2, 2, 4), (4, 2, 2), (8, 2, 1), (16, 1, 1)])
def test_every_published_batch_is_made_by_any_number_of_gpus(name, processes, images, passes):
    solver = published(name).SOLVER
    split = split_batch(solver.IMS_PER_BATCH, solver.IMS_PER_GPU, processes)
    assert (split.processes, split.images, split.count) == (processes, images, passes)
    assert processes * images * passes == solver.IMS_PER_BATCH == 16


@functools.cache
def published(name: str) -> CfgNode:
    return load_cfg(str(CONFIGS / name))


def test_the_names_of_published_configs_tell_their_schedules():
    """A step of 16 images; 50 epochs of COCO are 368750 steps, 500 of them for DETR 3696500."""
    steps = {"50ep": 368750, "500ep": 3696500, "90k": 90000, "160k": 160000}
    names = [name for name in LEAVES if Path(name).parts[0] not in ("toy", "nuclei")]
    assert len(names) == 55
    for name in names:
        batch, schedule = re.fullmatch(r".*_bs(\d+)_(\w+)", Path(name).stem).groups()
        solver = published(name).SOLVER
        assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (int(batch), steps[schedule]), name


@pytest.mark.parametrize(
    "name", [name for name in LEAVES if ("/eco/" in name or "_eco_" in name) and "nuclei" not in name]
)
def test_an_eco_config_differs_from_its_parent_in_the_method_alone(name):
    eco = leaves(load_cfg(str(CONFIGS / name)))
    backbone = next(b for b in BACKBONES if b in name)
    parent_name = name.replace("eco/eco_", "" if backbone == "R50" else "swin/").replace("_eco_", "_")
    parent = leaves(load_cfg(str(CONFIGS / parent_name)))
    different = {key for key in eco if eco[key] != parent[key] and not key.startswith("MODEL.ECO.")}
    exits = {"MODEL.PROSCALE.EXIT_AFTER_STAGES"} if "proscale111" in name else set()
    assert different == {"MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "OUTPUT_DIR"} | exits
    assert eco["MODEL.WEIGHTS"] == parent["OUTPUT_DIR"] + "/model_final.pth"


@pytest.mark.parametrize("name", LEAVES)
def test_the_first_comment_is_the_command_that_runs_this_very_file(name):
    text = (CONFIGS / name).read_text()
    commands = re.findall(r"--config-file configs/(\S+)", text)
    assert name in commands
