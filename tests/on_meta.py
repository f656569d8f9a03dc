"""Models without memory for their weights: shapes and names only."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eco_m2f.engine.setup import build_model

FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_}  # slow on meta, where they do nothing


class _ShapesAlone(TorchFunctionMode):
    """Initialises nothing. detectron2's Swin reads the rates of its stochastic depth from a tensor with values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def build_on_meta(cfg) -> nn.Module:
    """The model of a config on the meta device, whatever MODEL.DEVICE is."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), _ShapesAlone():
        return build_model(cfg)
