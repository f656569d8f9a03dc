"""Loads trained models: strictly, and for prediction fused, compiled and called with one image."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from torch import nn

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.parent_hash import parent_sha256
from ..data.mappers import PanopticTestMapper
from ..modeling import EarlyExits
from ..modeling.encoders.hybrid import fuse_for_deployment
from .optimizer import autocast
from .predictor import Predictor
from .setup import build_model, load_cfg, warn_of_keys_without_effect


def build_trained(cfg: CfgNode, with_policy: bool = True) -> nn.Module:
    """The model of a config in eval mode, with MODEL.WEIGHTS loaded strictly.

    with_policy: also loads what the exit policy needs, such as a gate. Step B needs none.
    """
    model = build_model(cfg)
    Checkpointer(model).load_for_evaluation(cfg.MODEL.WEIGHTS)
    check_things_known(model, cfg.MODEL.WEIGHTS)
    prepare = getattr(getattr(model, "exit_policy", None), "prepare", None)
    if with_policy and prepare is not None:
        prepare(parent_sha256(model.state_dict()))
    return model.eval()


def load_gate(model: EarlyExits, path: str) -> None:
    """Switches a model to another gate. Raises ValueError if it was fitted for other parent weights.

    Another thread may predict meanwhile: each batch gets its exits from the old gate or from the new one.
    """
    model.exit_policy.load_gate(path, parent_sha256(model.state_dict()))


def check_things_known(model: nn.Module, weights: str) -> None:
    """Raises ValueError for a panoptic model whose things are unknown, as no dataset or checkpoint has its classes."""
    postprocessor = getattr(model, "postprocessor", None)
    if getattr(postprocessor, "panoptic_on", False) and getattr(model, "classes", None) is None:
        raise ValueError(
            f"which of the model's classes are things is not known: the checkpoint {weights} does not hold its "
            "classes, and DATASETS.TRAIN names no registered dataset with MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"{postprocessor.num_classes} categories. Name the dataset of its training; the JSON of the annotation "
            "is enough (DATASETS.CUSTOM). Or save the checkpoint again with train_net.py --resume in its folder"
        )


def load_predictor(config_file: str, opts: Sequence[str] = ()) -> Predictor:
    """A function from an image (a path, a PIL image, an array or a tensor) to the model's result at the image's size.

    The datasets of the config may be absent, because the checkpoint holds the classes. TEST.AMP and TEST.COMPILE apply.
    Example: `load_predictor("configs/toy/eco.yaml", ["MODEL.WEIGHTS", "model.pth"])(image)["panoptic_seg"]`.
    """
    cfg = load_cfg(config_file, opts)
    warn_of_keys_without_effect(cfg)
    model = fuse_for_deployment(build_trained(cfg))
    if cfg.TEST.COMPILE:
        compile_for_deployment(model)
    return Predictor(model, PanopticTestMapper(cfg), lambda: autocast(cfg, model.device.type, cfg.TEST.AMP))


def compile_for_deployment(model: nn.Module) -> None:
    """Compiles backbone and head of a model in eval mode, in place, with their present weights.

    Each padded size and each exit is compiled on its first use, which takes about a minute. After eight of them PyTorch
    runs new ones uncompiled. So this is for few sizes, and for a fixed exit or a gate. From then on Inductor freezes
    weights in this process: it packs them for its matrix products.
    """
    from torch._inductor import config

    config.freezing = True
    for part in (model.backbone, model.head):
        part.compile(dynamic=False)
