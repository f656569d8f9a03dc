"""Any backbone of the package timm that yields maps of strides 4 to 32, under detectron2's names res2..res5."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor

from ...requirements import require

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm model without its head; built from MODEL.TIMM. tools/convert_timm.py makes its MODEL.WEIGHTS.

    Models that take images of one size only (timm's Swin and ViT) refuse others in their own words.

    Raises:
        ImportError: timm is missing.
        ValueError: timm has no such model, or the model no map of a wanted stride; says which there are.
    """

    def __init__(self, cfg, input_shape: ShapeSpec):
        super().__init__()
        t = cfg.MODEL.TIMM
        unknown = sorted(set(t.OUT_FEATURES) - set(STRIDES))
        if unknown:
            raise ValueError(f"MODEL.TIMM.OUT_FEATURES {unknown} unknown; there are {list(STRIDES)}")
        self.model = timm_features(t.NAME, [STRIDES[r] for r in t.OUT_FEATURES], input_shape.channels)
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # timm's enum is a str
        self._out_features = list(t.OUT_FEATURES)
        self._out_feature_channels = dict(zip(self._out_features, self.model.feature_info.channels()))
        self._out_feature_strides = {r: STRIDES[r] for r in self._out_features}
        if t.FREEZE_BN:
            self.model = require("timm.layers", "MODEL.TIMM.FREEZE_BN").freeze_batch_norm_2d(self.model)

    @property
    def size_divisibility(self) -> int:
        """Pixels."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {res2: [B, C, H/4, W/4], ...}."""
        maps = [m.permute(0, 3, 1, 2) if self._channels_last else m for m in self.model(x)]
        return {r: m.contiguous() for r, m in zip(self._out_features, maps)}


def timm_features(name: str, strides: list[int], channels: int) -> torch.nn.Module:
    """timm's feature extractor of that name, its weights random, that returns the deepest map of each stride."""
    timm = require("timm", f"the backbone {name!r}")
    if not timm.is_model(name):
        alike = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ValueError(f"MODEL.TIMM.NAME {name!r} is no model of timm {timm.__version__}; alike: {alike}")
    options = {"features_only": True, "pretrained": False, "in_chans": channels}
    with torch.device("meta"):
        there = timm.create_model(name, **options).feature_info.reduction()
    missing = sorted(set(strides) - set(there))
    if missing:
        raise ValueError(f"MODEL.TIMM.NAME {name!r} has no map of stride {missing}, only of {there}")
    deepest = {stride: index for index, stride in enumerate(there)}
    return timm.create_model(name, out_indices=[deepest[s] for s in strides], **options)
