"""Runs documented commands one after another in this process, on generated trees, and records the results.

    documented_job.py <folder> <file of commands, as JSON>

The folder gets `datasets/` with the trees, `output/` for all commands, and a working folder for each section of a page.
results.json has a `Result` per command, batches.json the first batches of each config.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(sys.argv[1]).resolve()
os.environ["DETECTRON2_DATASETS"] = str(FOLDER / "datasets")  # read when detectron2 is imported

import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402
from documented import Command  # noqa: E402
from documented_weights import write_published  # noqa: E402
from minis import CONFIGS, ROOT  # noqa: E402
from tiny import call  # noqa: E402
from trees import COUNT, TOY_SIZE, write_all  # noqa: E402

import eco_m2f.engine.setup  # noqa: E402
from eco_m2f.data.loader import build_train_loader  # noqa: E402
from eco_m2f.engine.datasets import build_test_loader  # noqa: E402
from eco_m2f.engine.setup import load_cfg  # noqa: E402

# A model of every part, a few hundred thousand parameters large; small images, two steps of two.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SWIN.EMBED_DIM": 16,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 12,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.DETR.HIDDEN_DIM": 32,
    "MODEL.DETR.DIM_FEEDFORWARD": 64,
    "MODEL.DETR.NUM_OBJECT_QUERIES": 12,
    "MODEL.DETR.DEC_LAYERS": 2,
    "MODEL.ECO.EXITS_PER_STEP": 2,
    "MODEL.DOVIT.EMBED_DIM": 24,
    "MODEL.DOVIT.NUM_HEADS": 2,
    "MODEL.DOVIT.HEAD_DIM": 16,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.AMP.ENABLED": False,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "DATALOADER.NUM_WORKERS": 0,
}
CROP = {"absolute": [64, 64], "absolute_range": [32, 64]}  # by INPUT.CROP.TYPE; a relative one is small as it is
OPTIONS = {  # of the tools themselves: no processes beside this one
    "derive_dataset": ["--workers", "0"],
    "check_dataset": ["--workers", "1"],
    "make_toy_dataset": ["--num-train", COUNT["train"], "--num-val", COUNT["val"], "--size", TOY_SIZE],
}
FEW_STEPS = ["--adam-iterations", "50"]  # of a gate whose optimizer a config names: the paper's takes 20,000
TAKES_KEYS = ("train_net", "derive_dataset", "sweep_thresholds", "analyze_model")
NAMES_ALONE = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.ECO.BETA")  # in which trainings may differ and be one run

CELLS = "name=cells_train,images=cells/train,panoptic=cells/pan_train,json=cells/pan_train.json"
PANOPTIC = ["coco_2017_{}_panoptic", "cityscapes_fine_panoptic_{}", "nuclei_panoptic_{}", "toy_panoptic_{}"]
BOXES = ["coco_2017_{}", "toy_detection_{}"]
STANDS_FOR = {  # a word of a command that the reader replaces
    "NAME": [name.format(split) for name in PANOPTIC + BOXES for split in ("train", "val")],
    "RAW": [str(FOLDER / "datasets" / "raw")],
    "name=...,...": [CELLS],
}
GIVEN = {  # by section: a file that the reader has from before, and which run has made it here
    "COCO and Cityscapes": {
        "parent.pth": "cityscapes/maskformer2_swin_tiny",
        "eco.pth": "cityscapes/eco_maskformer2_swin_tiny",
    },
    "Other encoders": {"lite.pth": "cityscapes/lite_maskformer2_swin_tiny"},
    "DoViT: tokens that stop": {"dovit.pth": "ade20k/dovit_vit_base_mask_bs16_160k"},
    "DETR": {"eco.pth": "coco/eco_detr_R50"},
    "Weights and gates": {"eco.pth": "cityscapes/eco_maskformer2_swin_tiny"},
    "Files that are not trusted": {"eco.pth": "cityscapes/eco_maskformer2_swin_tiny"},
}


@dataclasses.dataclass
class Result:
    """status: 0 is success. run_as: the command whose run this one shares, because only file names differ."""

    text: str
    page: str
    folder: str
    status: int
    seconds: float
    output: str
    run_as: str = ""


def setup(cfg: CfgNode, args) -> None:
    """detectron2's `default_setup` without its output, which takes a third of the time of a run."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    setup_logger(cfg.OUTPUT_DIR)
    seed_all_rng(max(cfg.SEED, 0))


def main() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # nobody keeps what is written here
    eco_m2f.engine.setup.default_setup = setup
    write_all(FOLDER / "datasets")
    write_cells(FOLDER / "datasets")
    (FOLDER / "output").mkdir()
    write_published(FOLDER / "published", list(flat(SMALL)))
    runs: dict[str, Command] = {}
    commands = [Command(**c) for c in json.loads(Path(sys.argv[2]).read_text())]
    results = [run(c, runs) for c in sorted(commands, key=parents_first)]
    (FOLDER / "results.json").write_text(json.dumps([dataclasses.asdict(r) for r in results]))
    (FOLDER / "batches.json").write_text(json.dumps(first_batches()))


def write_cells(datasets: Path) -> None:
    """The dataset in the guide's section on your own data."""
    nuclei = datasets / "nuclei"
    for split in ("train", "val"):
        shutil.copytree(nuclei / split, datasets / "cells" / split)
        shutil.copytree(nuclei / f"panoptic_{split}", datasets / "cells" / f"pan_{split}")
        shutil.copy(nuclei / "annotations" / f"panoptic_{split}.json", datasets / "cells" / f"pan_{split}.json")


def parents_first(command: Command) -> tuple:
    """Configs before pages. Among configs: converters of weights, then parents, then models that start from these."""
    if not command.page.startswith("configs/"):
        return (1,)  # in the order of the pages
    return 0, command.tool == "train_net", "eco_" in Path(command.page).name, command.page


def run(command: Command, runs: dict[str, Command]) -> Result:
    """runs: the finished runs by their key."""
    start = time.process_time()
    output, status, key = io.StringIO(), 1, ""
    with working_folder(command), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            key = key_of(command)
            status = share(command, runs[key]) if key in runs else call(*shrunk(command))
        except Exception:
            traceback.print_exc(file=output)
    first = runs.setdefault(key, command) if status == 0 else command
    run_as = "" if first is command else first.text
    seconds = time.process_time() - start
    return Result(command.text, command.page, command.folder, status, seconds, output.getvalue()[-3000:], run_as)


def key_of(command: Command) -> str:
    """The key of a run. Trainings are the same if their shrunk configs differ only in names of files."""
    if command.tool != "train_net" or "MODEL.WEIGHTS" in command.words or "OUTPUT_DIR" in command.words:
        return f"{command.folder} {command.text}"
    cfg = config_of(command).clone()
    cfg.defrost()
    cfg.merge_from_list([word for name in NAMES_ALONE for word in (name, type(value(cfg, name))())])
    return cfg.dump()


def share(command: Command, first: Command) -> int:
    """Links the results of the first run to the place where this command would have written them."""
    ours, theirs = (Path(config_of(c).OUTPUT_DIR) for c in (command, first))
    if not ours.exists():
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.symlink_to(theirs.resolve())
    return 0


def shrunk(command: Command) -> list:
    """The tool and its arguments for one process, with the KEY VALUE pairs of a small model."""
    tool, *words = command.words
    words = [w for word in words for w in STANDS_FOR.get(word, [word])]
    if "--num-gpus" in words:
        words[words.index("--num-gpus") + 1] = "1"
    script = f"../{Path(tool).with_suffix('')}"  # seen from tools/
    keys = list(flat(smaller(command))) if command.tool in TAKES_KEYS else []
    few = FEW_STEPS if command.tool == "train_gate" and command.config else ()
    return [script, *OPTIONS.get(command.tool, ()), *few, *words, *keys]


@functools.cache
def smaller(command: Command) -> dict:
    """`SMALL` without the keys that the command sets, and the pairs that depend on its config."""
    cfg = config_at(command.config)
    more = {"INPUT.CROP.SIZE": CROP.get(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)}
    if cfg.INPUT.SIZE_DIVISIBILITY > 0:
        more["INPUT.SIZE_DIVISIBILITY"] = 64
    if cfg.SOLVER.IMS_PER_GPU and "_R50_" in command.config:  # two passes; the others are what eight GPUs run
        more["SOLVER.IMS_PER_GPU"] = 1
    if cfg.MODEL.WEIGHTS.startswith("detectron2://") or "/vit_" in cfg.MODEL.WEIGHTS:
        more["MODEL.WEIGHTS"] = ""  # those are downloaded
    return {key: v for key, v in {**SMALL, **more}.items() if key not in command.words}


@functools.cache
def config_at(path: str) -> CfgNode:
    """The config of a file below configs/, as it is."""
    return load_cfg(str(CONFIGS / path))


@functools.cache
def config_of(command: Command) -> CfgNode:
    """The shrunk config of a command."""
    words = command.words[command.words.index("--config-file") + 2 :]
    own = [w for w in words if w not in ("--eval-only", "--resume")]
    return load_cfg(str(CONFIGS / command.config), [*own, *flat(smaller(command))])


def value(cfg: CfgNode, name: str):
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def flat(keys: dict) -> Iterator[str]:
    for key, v in keys.items():
        yield from (key, str(v))


@contextlib.contextmanager
def working_folder(command: Command) -> Iterator[None]:
    """The folder of a reader who follows the page: with configs/, output/ and the given files."""
    folder = FOLDER / "work" / command.folder
    if not folder.exists():
        folder.mkdir(parents=True)
        places = {"configs": ROOT / "configs", "output": FOLDER / "output", "cells": FOLDER / "datasets" / "cells"}
        places |= {path.name: path for path in (FOLDER / "published").iterdir()}
        given = GIVEN.get(command.section, {}).items()
        places |= {name: FOLDER / "output" / made / "model_final.pth" for name, made in given}
        for name, place in places.items():
            (folder / name).symlink_to(place)
    with contextlib.chdir(folder):
        yield


def first_batches() -> dict[str, dict]:
    """{config: its first training batch and its first test image}, by the official names and with its augmentation.
    Only the batch is smaller. Parts that several configs share are read once."""
    found, batches = {}, {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        cfg = load_cfg(str(path), ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0])
        head = cfg.MODEL.SEM_SEG_HEAD
        key = str((cfg.DATASETS, cfg.INPUT, cfg.DATALOADER, head.NUM_CLASSES, head.IGNORE_VALUE))
        if key not in batches:
            batches[key] = first_batch(cfg)
        found[str(path.relative_to(CONFIGS))] = batches[key]
    return found


def first_batch(cfg: CfgNode) -> dict:
    batch = next(iter(build_train_loader(cfg, seed=0)))
    test = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    return {
        "images": [list(x["image"].shape) for x in batch],
        "classes": sorted({c for x in batch for c in x["instances"].gt_classes.tolist()}),
        "files": [str(Path(x["file_name"]).relative_to(FOLDER / "datasets")) for x in batch],
        "test_image": list(test[0]["image"].shape),
        "test_file": str(Path(test[0]["file_name"]).relative_to(FOLDER / "datasets")),
    }


if __name__ == "__main__":
    main()
