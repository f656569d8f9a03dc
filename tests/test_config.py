"""The published configs, the official keys, and the effect of every declared key."""

import argparse
import functools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from minis import CONFIGS, ECO, MINI, PROSCALE, RT
from on_meta import build_on_meta
from tiny import Tiny, kept_log_handlers

from eco_m2f.config import WITHOUT_EFFECT, add_eco_config, leaves, set_without_effect
from eco_m2f.data.batch_size import split_batch
from eco_m2f.data.datasets import register_from_config
from eco_m2f.engine.datasets import check_number_of_classes
from eco_m2f.engine.derive import derive
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.optimizer import autocast
from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.setup import build_model, gate_settings, load_cfg, setup, warn_of_keys_without_effect
from eco_m2f.engine.train import Trainer
from eco_m2f.evaluation.build import evaluators_for
from eco_m2f.modeling import DoViT, EarlyExits, EcoMaskFormer

ALL = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in ALL if not Path(name).name.startswith("Base-")]
DOVIT = [name for name in LEAVES if Path(name).name.startswith("dovit")]
PAPER = [name for name in LEAVES if "/panoptic-segmentation/" in name]
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


def own_keys() -> set[str]:
    """The keys that add_eco_config adds to detectron2's and DeepLab's."""
    base, ours = get_cfg(), get_cfg()
    add_deeplab_config(base)
    add_eco_config(ours)
    return set(leaves(ours)) - set(leaves(base))


# --- the files -------------------------------------------------------------------------------------------------------


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


# --- the official keys -----------------------------------------------------------------------------------------------

# Every key of the official panoptic YAML files and of their defaults, with values other than this project's defaults.
OFFICIAL = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  WEIGHTS: "model_final_94dc52.pkl"
  PIXEL_MEAN: [123.0, 116.0, 103.0]
  PIXEL_STD: [58.0, 57.0, 56.0]
  BACKBONE: {FREEZE_AT: 0, NAME: "D2SwinTransformer"}
  RESNETS:
    DEPTH: 101
    STEM_TYPE: "basic"
    STEM_OUT_CHANNELS: 32
    STRIDE_IN_1X1: False
    NORM: "BN"
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
    RES5_MULTI_GRID: [1, 1, 2]
  SWIN:
    PRETRAIN_IMG_SIZE: 384
    PATCH_SIZE: 2
    EMBED_DIM: 128
    DEPTHS: [2, 2, 18, 2]
    NUM_HEADS: [4, 8, 16, 32]
    WINDOW_SIZE: 12
    MLP_RATIO: 3.0
    QKV_BIAS: False
    QK_SCALE: null
    DROP_RATE: 0.1
    ATTN_DROP_RATE: 0.1
    DROP_PATH_RATE: 0.2
    APE: True
    PATCH_NORM: False
    OUT_FEATURES: ["res3", "res4", "res5"]
    USE_CHECKPOINT: True
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IN_FEATURES: ["res2", "res3", "res4"]
    IGNORE_VALUE: 254
    NUM_CLASSES: 133
    LOSS_WEIGHT: 2.0
    CONVS_DIM: 128
    MASK_DIM: 128
    NORM: "BN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    COMMON_STRIDE: 8
    TRANSFORMER_ENC_LAYERS: 6
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res4", "res5"]
    DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS: 3
    DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS: 4
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "StandardTransformerDecoder"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEEP_SUPERVISION: False
    NO_OBJECT_WEIGHT: 0.2
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    HIDDEN_DIM: 128
    NUM_OBJECT_QUERIES: 200
    NHEADS: 4
    DROPOUT: 0.0
    DIM_FEEDFORWARD: 1024
    ENC_LAYERS: 1
    PRE_NORM: True
    ENFORCE_INPUT_PROJ: True
    SIZE_DIVISIBILITY: 64
    DEC_LAYERS: 10
    TRAIN_NUM_POINTS: 1000
    OVERSAMPLE_RATIO: 2.0
    IMPORTANCE_SAMPLE_RATIO: 0.5
    TEST:
      SEMANTIC_ON: False
      INSTANCE_ON: True
      PANOPTIC_ON: True
      OVERLAP_THRESHOLD: 0.8
      OBJECT_MASK_THRESHOLD: 0.8
      SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: True
DATASETS:
  TRAIN: ["coco_2017_train_panoptic"]
  TEST: ["coco_2017_val_panoptic_with_sem_seg"]
SOLVER:
  IMS_PER_BATCH: 8
  BASE_LR: 0.0002
  STEPS: [327778, 355092]
  MAX_ITER: 368750
  LR_SCHEDULER_NAME: "WarmupPolyLR"
  POLY_LR_POWER: 0.8
  POLY_LR_CONSTANT_ENDING: 0.1
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  WEIGHT_DECAY: 0.05
  WEIGHT_DECAY_NORM: 0.01
  WEIGHT_DECAY_EMBED: 0.1
  OPTIMIZER: "SGD"
  BACKBONE_MULTIPLIER: 0.2
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT:
  DATASET_MAPPER_NAME: "coco_panoptic_lsj"
  IMAGE_SIZE: 512
  MIN_SCALE: 0.2
  MAX_SCALE: 1.5
  FORMAT: "RGB"
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 32
  MIN_SIZE_TRAIN: [512, 1024]
  MIN_SIZE_TRAIN_SAMPLING: "choice"
  MIN_SIZE_TEST: 1024
  MAX_SIZE_TRAIN: 4096
  MAX_SIZE_TEST: 2048
  CROP: {ENABLED: True, TYPE: "absolute", SIZE: [512, 1024], SINGLE_CATEGORY_MAX_AREA: 0.5}
TEST: {EVAL_PERIOD: 5000, DETECTIONS_PER_IMAGE: 50}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: True, NUM_WORKERS: 4}
VERSION: 2
"""


def test_official_keys_merge_and_keep_their_values(tmp_path):
    path = tmp_path / "official.yaml"
    path.write_text(OFFICIAL)
    # SyncBN and CUDA fall back on a machine without a GPU; nothing else may change on loading
    loaded = leaves(load_cfg(str(path), ["MODEL.DEVICE", "cpu"]))
    for key, value in leaves(yaml.safe_load(OFFICIAL)).items():
        assert list(loaded[key]) == value if isinstance(value, list) else loaded[key] == value, key


OWN_PARTS = ("MODEL.ECO.", "MODEL.TIMM.", "MODEL.PROSCALE.", "MODEL.HYBRID.", "MODEL.DOVIT.", "MODEL.DETR.")


def test_official_keys_are_all_in_that_file():
    """The keys that are not in the official list are this project's own."""
    assert own_keys() - set(leaves(yaml.safe_load(OFFICIAL))) == {
        "DATASETS.CUSTOM",
        "MODEL.MASK_FORMER.MASK_LOSS",
        "MODEL.SEM_SEG_HEAD.MASK_BRANCH",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AMP",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME",
        "SOLVER.IMS_PER_GPU",
        "SOLVER.AMP.PRECISION",
        "TEST.AMP",
        "TEST.COMPILE",
        *(key for key in own_keys() if key.startswith(OWN_PARTS)),
    }


# --- every key is read -----------------------------------------------------------------------------------------------


class Reads:
    """Records which keys of a config are read as attributes, also in its clones."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen = set()
        original = CfgNode.__getattr__

        def recording(node, name):
            path = node.__dict__.get("_path")
            if path is not None and name in node and not isinstance(node[name], CfgNode):
                self.seen.add(path + name)
            return original(node, name)

        patch.setattr(CfgNode, "__getattr__", recording)

    def watch(self, cfg: CfgNode, prefix: str = "") -> CfgNode:
        cfg.__dict__["_path"] = prefix
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                self.watch(value, f"{prefix}{key}.")
        return cfg


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), num_train=2, num_val=1)


SWIN = [*("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", (1, 1, 1, 1))]
ONE_EXIT = ("MODEL.ECO.EXITS", (1,), "MODEL.ECO.EXIT", 1, "MODEL.ECO.MAX_EXIT", 1, "MODEL.ECO.EXITS_PER_STEP", 1)
VARIANTS = {
    "R50": (),
    "swin": SWIN,
    "lsj": ("INPUT.DATASET_MAPPER_NAME", "coco_panoptic_lsj", "INPUT.IMAGE_SIZE", 64),
    "semantic alone": ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
    "poly": ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),
    "proscale": (*PROSCALE, "MODEL.ECO.EXITS", (5, 6), "MODEL.ECO.EXITS_PER_STEP", 2),
    "hybrid": (*RT, *ONE_EXIT),
    "timm": ("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "resnet18"),
}


@pytest.fixture(scope="module")
def seen(tiny) -> set[str]:
    """The keys that are read by setting up, training and evaluating models of all kinds, and by predicting."""
    with pytest.MonkeyPatch.context() as patch:
        return read_keys(tiny, patch)


def read_keys(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    reads = Reads(monkeypatch)
    spy = Spy(register_from_config)
    for module in ("setup", "datasets"):
        monkeypatch.setattr(f"eco_m2f.engine.{module}.register_from_config", spy)
    absent = () if find_spec("timm") else ("timm",)  # an optional package; its keys are read where it is installed
    variants = [("eco_maskformer2", options) for name, options in VARIANTS.items() if name not in absent]
    for kind, options in [*variants, ("eco_detr", ())]:
        cfg = reads.watch(load_cfg(tiny.config(kind), list(options)))
        trainer = Trainer(cfg)
        trainer.build_hooks()
        autocast(cfg, "cpu", cfg.SOLVER.AMP.ENABLED)
        evaluators_for(cfg.DATASETS.TEST[0])
    for head in ("NaiveHead", "MaskTransformerHead"):
        build_model(reads.watch(load_cfg(tiny.config("dovit"), ["MODEL.SEM_SEG_HEAD.NAME", head])))
    with pytest.raises(OSError):
        options = ["MODEL.DOVIT.TEACHER", str(tiny.base / "no.pth")]
        Trainer(reads.watch(load_cfg(tiny.config("dovit"), options)))
    for policy in ("LinearGate", "OracleExit"):
        with pytest.raises((ValueError, OSError)):
            cfg = load_cfg(
                tiny.config(), ["MODEL.ECO.POLICY", policy, "MODEL.ECO.GATE", "no", "MODEL.ECO.DERIVED", "no"]
            )
            build_model(reads.watch(cfg))
    build_model(reads.watch(load_cfg(tiny.config(), ["MODEL.ECO.POLICY", "StateChangeExit"])))
    gate_settings(reads.watch(load_cfg(tiny.config())))
    cfg = reads.watch(load_cfg(tiny.config(), ["MODEL.ECO.QUALITY", "BoxAP"]))
    with pytest.raises(ValueError, match="BoxAP needs a model of boxes"):
        derive(cfg, build_model(cfg), tiny.dataset("train"), str(tiny.base / "derived"), shard_size=1)
    several = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False]
    cfg = reads.watch(load_cfg(tiny.config(), several))
    evaluate(cfg, build_model(cfg).eval())
    with monkeypatch.context() as patch:
        patch.setattr("eco_m2f.engine.predict.load_cfg", lambda *_: cfg)
        patch.setattr("eco_m2f.engine.setup.load_cfg", lambda *_: cfg)
        patch.setattr("eco_m2f.engine.predict.build_trained", lambda cfg: build_model(cfg).eval())
        patch.setattr("eco_m2f.engine.setup.setup_logger", lambda *_, **__: None)
        load_predictor("")
        with kept_log_handlers():
            setup(argparse.Namespace(config_file="", opts=[], eval_only=False))
    assert spy.called  # DATASETS.CUSTOM is read while the config is loaded, before it can be watched
    unread_package = {key for key in own_keys() if absent and key.startswith("MODEL.TIMM.")}
    return reads.seen | {"DATASETS.CUSTOM"} | unread_package


def test_each_key_is_read_by_what_trains_and_evaluates(seen):
    assert own_keys() - seen == set()


READ_ELSEWHERE = {  # keys of detectron2 that take effect, though the models of this test do not show it
    "CUDNN_BENCHMARK": "read in the file that detectron2's default_setup writes",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": "of a crop",
    "SOLVER.NUM_DECAYS": "of the scheduler WarmupStepWithFixedGammaLR",
    "SOLVER.MOMENTUM": "of SGD",
    "MODEL.WEIGHTS": "loaded before a training or an evaluation",
    "TEST.EXPECTED_RESULTS": "compared after a training",
    "VERSION": "of the format of the file",
    **dict.fromkeys(("MODEL.RESNETS.RES4_DILATION", "MODEL.RESNETS.RES5_MULTI_GRID"), "of DeepLab's ResNet"),
    "MODEL.RESNETS.STEM_TYPE": "of DeepLab's ResNet",
    **dict.fromkeys(f"MODEL.FPN.{key}" for key in ("FUSE_TYPE", "IN_FEATURES", "NORM", "OUT_CHANNELS")),  # of an FPN
}


def test_the_keys_without_effect_are_those_that_nothing_reads(seen):
    """detectron2's trainer reads TEST.PRECISE_BN, but its hook does not run here."""
    every = get_cfg()
    add_eco_config(every)
    named = {key for key in leaves(every) if any(f"{key}.".startswith(f"{path}.") for path in WITHOUT_EFFECT)}
    assert set(leaves(every)) - seen - set(READ_ELSEWHERE) | {"TEST.PRECISE_BN.ENABLED"} == named
    assert set(READ_ELSEWHERE) & seen <= {"CUDNN_BENCHMARK"}


def test_a_key_without_effect_is_told_with_its_value(tiny, caplog):
    options = ["TEST.PRECISE_BN.ENABLED", True, "MODEL.RPN.NMS_THRESH", 0.5, "SOLVER.NESTEROV", False]
    warn_of_keys_without_effect(load_cfg(tiny.config(), options))
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [message.split(", which")[0] for message in messages] == [
        *("MODEL.RPN.NMS_THRESH is 0.5", "TEST.PRECISE_BN.ENABLED is True")
    ]


@pytest.mark.parametrize("name", LEAVES)
def test_no_config_of_ours_sets_a_key_without_effect(name):
    assert set_without_effect(load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])) == {}


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_names_of_datasets_are_texts(key):
    with pytest.raises(ValueError, match=rf"{key} is .*\[1\].*: give a list of dataset names"):
        load_cfg(str(CONFIGS / LEAVES[0]), [key, "[[1]]"])


class Spy:
    def __init__(self, function):
        self.function, self.called = function, False

    def __call__(self, specs, *options, **more):
        self.called = bool(specs)
        return self.function(specs, *options, **more)


def drawn(model) -> list:
    """Exits and weights of the first iterations."""
    return [model.sampler(i) for i in range(8)]


TWO = ("MODEL.ECO.EXITS_PER_STEP", 2)
CHANGES = {  # key: what is set besides, its new value, and where the change shows
    "EXITS": (TWO, (2, 4, 6), lambda model: model.exits),
    "ALPHA": (TWO, "uniform", drawn),
    "EXITS_PER_STEP": (TWO, 3, drawn),
    "SEED": (TWO, 1, drawn),
    "POLICY": ((), "LinearGate", lambda model: type(model.exit_policy)),
    "EXIT": ((), 4, lambda model: model.exit_policy.exits),
    "MAX_EXIT": (("MODEL.ECO.POLICY", "LinearGate"), 4, lambda model: model.exit_policy.exits),
    "CHANGE_THRESHOLD": (("MODEL.ECO.POLICY", "StateChangeExit"), 0.5, lambda model: model.exit_policy.threshold),
    "FEATURE": (("MODEL.ECO.POLICY", "LinearGate"), "projected", lambda model: model.exit_policy.in_channels),
}


@pytest.mark.parametrize("key", sorted(CHANGES))
def test_changing_an_eco_key_changes_the_model(tiny, key):
    """GATE, BETA and DERIVED need files: tests/policies/test_exit_policies.py; LOSS and GATE_SOLVER are Step C's."""
    common, value, look = CHANGES[key]
    before = build_model(load_cfg(tiny.config(), list(common)))
    after = build_model(load_cfg(tiny.config(), [*common, f"MODEL.ECO.{key}", value]))
    assert look(before) != look(after)


@pytest.mark.parametrize("value", ["[1, 2, 3, 4, 6]", (1, 2, 3, 4, 6), [1, 2, 3, 4, 6]])
@pytest.mark.parametrize("before", ["linear", "[1, 2, 3, 4, 5]"])
def test_alpha_is_a_text_or_a_list_in_a_file_and_as_an_option(tiny, tmp_path, value, before):
    """A later value may have another type than an earlier one."""
    path = tmp_path / "base.yaml"
    path.write_text(f"_BASE_: {tiny.config()}\nMODEL: {{ECO: {{EXITS_PER_STEP: 5, ALPHA: {before}}}}}\n")
    listed = tmp_path / "list.yaml"
    listed.write_text(f"_BASE_: {path}\nMODEL: {{ECO: {{ALPHA: [1, 2, 3, 4, 6]}}}}\n")
    wanted = {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 6.0}
    for name, options in ((listed, []), (path, ["MODEL.ECO.ALPHA", value])):
        assert build_model(load_cfg(str(name), options)).sampler(0) == wanted
    model = build_model(load_cfg(str(listed), ["MODEL.ECO.ALPHA", "uniform"]))
    assert model.sampler(0) == dict.fromkeys(wanted, 1.0)


@pytest.mark.parametrize("value", [0.5, None, "list", "[[1], [2], [3], [4], [5]]", "['a', 'b', 'c', 'd', 'e']"])
def test_an_alpha_that_is_neither_is_refused(tiny, value):
    with pytest.raises(ValueError, match="unknown alpha .*'linear', 'uniform', or a list"):
        build_model(load_cfg(tiny.config(), ["MODEL.ECO.ALPHA", value]))


REFUSED = {"SOLVER.ACCUMULATION_STEPS": ("SOLVER.IMS_PER_BATCH", 8, 1), "MODEL.ECO.ALPHA_LIST": ("ALPHA", [1, 2], [])}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_removed_key_is_refused_with_what_to_set_instead(tmp_path, key):
    remedy, set_value, idle = REFUSED[key]
    for value in (set_value, idle):
        with pytest.raises(ValueError, match=rf"options.*the key {key} was removed.*{remedy}"):
            load_cfg(str(CONFIGS / ECO), [key, value])
    with pytest.raises(ValueError, match=rf"old.yaml.*the key {key} was removed.*{remedy}"):
        load_cfg(old_config(tmp_path, key, set_value))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_removed_key_that_did_nothing_may_stand_in_the_config_of_an_earlier_run(tmp_path, key):
    """Such a run can be evaluated and continued. Its config.yaml has every key."""
    kept = load_cfg(old_config(tmp_path, key, REFUSED[key][2]), MINI)
    wanted = load_cfg(str(CONFIGS / ECO), MINI)
    assert leaves(yaml.safe_load(kept.dump())) == leaves(yaml.safe_load(wanted.dump()))


def old_config(folder: Path, key: str, value: object) -> str:
    """An ECO config as an earlier version wrote it."""
    content = yaml.safe_load(load_cfg(str(CONFIGS / ECO)).dump())
    *nodes, last = key.split(".")
    functools.reduce(dict.__getitem__, nodes, content)[last] = value
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("name", [name for name in PAPER if "eco" in Path(name).name])
def test_step_c_of_the_papers_configs_is_the_papers(name):
    """Adam, for 2 epochs of COCO or 20k iterations of Cityscapes; hard-CE; beta by dataset; K is the last exit."""
    cfg = load_cfg(str(CONFIGS / name))
    settings = gate_settings(cfg)
    coco = Path(name).parts[0] == "coco"
    assert (settings["adam_epochs"], settings["adam_iterations"]) == ((2, 0) if coco else (0, 20000))
    assert settings["optimizer"] == "adam" and settings["loss"] == ["hard_ce"]
    assert settings["beta"] == [0.0005 if coco else 0.003] and settings["max_exit"] == [cfg.MODEL.ECO.EXITS[-1]]
