"""Config, output folder, loggers and model of a run."""

import argparse
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config import add_eco_config, leaves, merge_options, merge_settings, set_without_effect
from ..data.classes import dataset_classes
from ..data.datasets import register_from_config
from ..modeling.parent import Classified
from .command_line import hide_training_trace
from .config_file import read_config
from .resuming import settings_before, warn_of_changes

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A frozen config from a YAML file and KEY VALUE pairs. Registers its custom datasets.

    A dataset without annotation file is skipped: prediction does not need it, and `check_datasets` checks for it later.
    Without a GPU MODEL.DEVICE cuda becomes cpu. Raises FileNotFoundError, or ValueError for invalid keys or values.
    """
    loaded = read_config(config_file)
    cfg = get_cfg()
    add_eco_config(cfg)
    with _explained(f"the config file {config_file}"):
        if loaded.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"its VERSION is {loaded['VERSION']!r}, but only {cfg.VERSION} is supported")
        merge_settings(cfg, loaded)
        check_numbers(cfg)
    with _explained("the list of options KEY VALUE"):
        merge_options(cfg, opts)
        check_numbers(cfg)
    for key in ("TRAIN", "TEST"):
        if not all(isinstance(name, str) for name in cfg.DATASETS[key]):
            raise ValueError(f"DATASETS.{key} is {cfg.DATASETS[key]!r}: give a list of dataset names")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    for part in (cfg.MODEL.RESNETS, cfg.MODEL.HYBRID, cfg.MODEL.DOVIT):
        if cfg.MODEL.DEVICE == "cpu" and part.NORM == "SyncBN":
            part.NORM = "BN"  # SyncBN runs on GPUs only; the parameters are the same
    register_from_config(cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN, absent_ok=True)
    cfg.freeze()
    return cfg


def warn_of_keys_without_effect(cfg: CfgNode) -> None:
    """Logs a warning for each key of detectron2 that is set but that nothing here reads."""
    for key, value in set_without_effect(cfg).items() if comm.is_main_process() else ():
        logger.warning("%s is %r, which has no effect: nothing here reads this key", key, value)


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns errors of yacs into a ValueError that names the source of the key or value."""
    try:
        yield
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        reason = reason or "a value in it is nested too deeply"
        raise ValueError(
            f"{source} cannot be used: {reason}. The keys and their defaults are in eco_m2f/config.py and detectron2"
        ) from error


def check_numbers(cfg: CfgNode) -> None:
    """Raises ValueError, naming the key, for numbers that are NaN or infinite, and for SOLVER.MAX_ITER below 1."""
    for key, value in leaves(cfg).items():
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(f"{key} is {number}: give a finite number")
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: give at least 1 iteration")


def _numbers(value: object) -> Iterator[float]:
    """The floats in a value, or in its items."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of the command line. Also sets up output folder, loggers and seeds."""
    hide_training_trace()
    cfg = load_cfg(args.config_file, args.opts)
    before = None
    if getattr(args, "resume", False) and comm.is_main_process():
        before = settings_before(cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH)
    if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu" and torch.distributed.get_backend() == "nccl":
        raise ValueError("MODEL.DEVICE is cpu, but each process took a GPU: hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="eco_m2f")
    warn_of_keys_without_effect(cfg)
    if before is not None:
        warn_of_changes(before, yaml.safe_load(cfg.dump()))
    return cfg


def gate_settings(cfg: CfgNode) -> dict:
    """The settings of Step C in a config: exits, feature, and how a gate is fitted; see `tools/train_gate.py`."""
    eco, solver = cfg.MODEL.ECO, cfg.MODEL.ECO.GATE_SOLVER
    return {
        "exits": list(eco.EXITS),
        "feature_source": eco.FEATURE,
        "beta": [eco.BETA],
        "max_exit": [eco.MAX_EXIT],
        "loss": [eco.LOSS],
        "optimizer": solver.OPTIMIZER,
        "adam_lr": solver.ADAM_LR,
        "adam_batch": solver.ADAM_BATCH,
        "adam_epochs": solver.ADAM_EPOCHS,
        "adam_iterations": solver.ADAM_ITERATIONS,
    }


def build_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, on its device. It gets the classes of its dataset if that is registered.

    Raises ValueError if the config names an unknown part.
    """
    try:
        model = build_detectron2_model(cfg)
    except KeyError as error:
        if "registry" not in str(error):
            raise
        raise ValueError(
            f"the config names an unknown part: {error.args[0]} Correct the name, or import its module"
        ) from error
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    classes = dataset_classes(names[0]) if names else []
    if len(classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES and isinstance(model, Classified):
        model.set_classes(classes)
    return model
