"""Models without memory for their weights: shapes and names only."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from eco_m2f.engine.setup import build_model


class _ValuesOfLinspace(TorchFunctionMode):
    """detectron2's Swin reads the rates of its stochastic depth from a tensor, so that tensor needs values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def build_on_meta(cfg) -> nn.Module:
    """The model of a config on the meta device, whatever MODEL.DEVICE is."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), _ValuesOfLinspace():
        return build_model(cfg)
