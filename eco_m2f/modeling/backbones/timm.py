"""Backbones of the package timm with maps of strides 4 to 32, under detectron2's names res2..res5."""

import functools

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...requirements import require

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm model without its head, built from MODEL.TIMM. tools/convert_timm.py makes its MODEL.WEIGHTS.

    MODEL.TIMM.OUTPUT_STRIDE 16 dilates res5 instead of halving its size, as in DETR-DC5. Some models cannot do this.
    MODEL.BACKBONE.FREEZE_AT n freezes the parameters of the maps of strides up to 2^n: 2 up to res2, 5 all, 0 none.
    Models for one image size (timm's Swin and ViT) refuse other sizes with timm's own message.

    Raises:
        ImportError: timm is missing.
        ValueError: timm has no such model, or the model has no map of a wanted stride, or cannot be dilated. Or a part
            is frozen, but not its batch normalisation.
    """

    def __init__(self, cfg, input_shape: ShapeSpec):
        super().__init__()
        t = cfg.MODEL.TIMM
        unknown = sorted(set(t.OUT_FEATURES) - set(STRIDES))
        if unknown:
            raise ValueError(f"MODEL.TIMM.OUT_FEATURES {unknown} unknown; there are {list(STRIDES)}")
        self._out_features = sorted(t.OUT_FEATURES, key=STRIDES.get)  # timm returns them fine to coarse
        strides = [STRIDES[r] for r in self._out_features]
        self.model = timm_features(t.NAME, strides, input_shape.channels, t.OUTPUT_STRIDE)
        if cfg.MODEL.BACKBONE.FREEZE_AT:
            self._freeze(cfg.MODEL.BACKBONE.FREEZE_AT, t)
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # timm's enum is a string
        self._out_feature_channels = dict(zip(self._out_features, self.model.feature_info.channels()))
        self._out_feature_strides = dict(zip(self._out_features, self.model.feature_info.reduction()))
        if t.FREEZE_BN:
            self.model = require("timm.layers", "MODEL.TIMM.FREEZE_BN").freeze_batch_norm_2d(self.model)

    def _freeze(self, freeze_at: int, t) -> None:
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        if normed and not t.FREEZE_BN:
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but MODEL.TIMM.FREEZE_BN False would let statistics of the "
                "frozen part change: set it to True, or FREEZE_AT to 0"
            )
        frozen = parameters_up_to(2**freeze_at, t.NAME)
        if not frozen:
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT {freeze_at} freezes nothing of {t.NAME!r}, which has no map of stride "
                f"{2**freeze_at} or finer: set it to 2 or more, or to 0"
            )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)

    @property
    def size_divisibility(self) -> int:
        """In pixels."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {res2: [B, C, H/4, W/4], ...}."""
        maps = [m.permute(0, 3, 1, 2) if self._channels_last else m for m in self.model(x)]
        return {r: m.contiguous() for r, m in zip(self._out_features, maps)}


@functools.cache
def parameters_up_to(stride: int, name: str) -> frozenset[str]:
    """The names of the parameters of a timm model that its maps of this stride and finer strides depend on."""
    timm = require("timm", f"the backbone {name!r}")
    with torch.device("meta"), torch.enable_grad():
        model = timm.create_model(name, features_only=True).eval()
        image = torch.zeros(1, *timm.get_pretrained_cfg(name).input_size)
        maps = [m.sum() for m, s in zip(model(image), model.feature_info.reduction()) if s <= stride]
        names, parameters = zip(*model.named_parameters())
        grads = torch.autograd.grad(maps, parameters, allow_unused=True) if maps else [None] * len(names)
    return frozenset(n for n, grad in zip(names, grads) if grad is not None)


@functools.cache
def strides_of(name: str) -> tuple[int, ...]:
    """Of the maps of timm's model, in the order in which it returns them."""
    timm = require("timm", f"the backbone {name!r}")
    with torch.device("meta"):
        return tuple(timm.create_model(name, features_only=True).feature_info.reduction())


def timm_features(name: str, strides: list[int], channels: int, output_stride: int = 32) -> torch.nn.Module:
    """timm's feature extractor of that name, with random weights. It returns the deepest map of each stride.

    An output_stride of 16 (or 8) dilates the layers after it, so all coarser maps have that stride.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"MODEL.TIMM.OUTPUT_STRIDE must be 8, 16 or 32, not {output_stride}")
    timm = require("timm", f"the backbone {name!r}")
    if not timm.is_model(name):
        alike = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ValueError(f"MODEL.TIMM.NAME {name!r} is no model of timm {timm.__version__}; similar names: {alike}")
    options = {"features_only": True, "pretrained": False, "in_chans": channels}
    there = strides_of(name)
    missing = sorted(set(strides) - set(there))
    if missing:
        raise ValueError(f"MODEL.TIMM.NAME {name!r} has no map of stride {missing}, only of {list(there)}")
    deepest = {stride: index for index, stride in enumerate(there)}
    if output_stride == 32:
        return timm.create_model(name, out_indices=[deepest[s] for s in strides], **options)
    try:
        return timm.create_model(
            name, out_indices=[deepest[s] for s in strides], output_stride=output_stride, **options
        )
    except (AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} cannot be built with MODEL.TIMM.OUTPUT_STRIDE {output_stride} ({error}): set it "
            "to 32, or take a model that can be dilated, as timm's ResNets and EfficientNets"
        ) from error
