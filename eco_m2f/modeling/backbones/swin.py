"""Mask2Former's `D2SwinTransformer`: an adapter over detectron2's own SwinTransformer.

The parameters have the published names already; what differs is the names of the maps (res2..res5), the size
divisibility, and that stochastic depth comes from torchvision instead of timm.
"""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import SwinTransformer
from torch import Tensor
from torchvision.ops import StochasticDepth


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer):
    """Swin whose maps are called res2..res5 (strides 4..32); built from MODEL.SWIN."""

    def __init__(self, cfg, input_shape: ShapeSpec):
        s = cfg.MODEL.SWIN
        super().__init__(
            pretrain_img_size=s.PRETRAIN_IMG_SIZE,
            patch_size=s.PATCH_SIZE,
            in_chans=input_shape.channels,
            embed_dim=s.EMBED_DIM,
            depths=s.DEPTHS,
            num_heads=s.NUM_HEADS,
            window_size=s.WINDOW_SIZE,
            mlp_ratio=s.MLP_RATIO,
            qkv_bias=s.QKV_BIAS,
            qk_scale=s.QK_SCALE,
            drop_rate=s.DROP_RATE,
            attn_drop_rate=s.ATTN_DROP_RATE,
            drop_path_rate=0.0,
            ape=s.APE,
            patch_norm=s.PATCH_NORM,
            use_checkpoint=s.USE_CHECKPOINT,
        )
        self._set_drop_path(s.DROP_PATH_RATE)
        self._rename_maps(s.OUT_FEATURES)

    def _set_drop_path(self, rate: float) -> None:
        """Stochastic depth, its rate rising linearly from 0 to `rate` over all blocks."""
        blocks = [block for layer in self.layers for block in layer.blocks]
        for block, p in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
            if p > 0:
                block.drop_path = StochasticDepth(p, mode="row")

    def _rename_maps(self, wanted: list[str]) -> None:
        names = {f"p{i}": f"res{i + 2}" for i in range(self.num_layers)}
        unknown = set(wanted) - set(names.values())
        if unknown:
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES {sorted(unknown)} unknown; there are {list(names.values())}")
        self._names = {p: r for p, r in names.items() if r in wanted}
        self._out_features = list(self._names.values())
        self._out_feature_channels = {r: int(self._out_feature_channels[p]) for p, r in self._names.items()}
        self._out_feature_strides = {r: self._out_feature_strides[p] for p, r in self._names.items()}

    @property
    def size_divisibility(self) -> int:
        """Pixels; detectron2's own property reads an attribute that its constructor misspells."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {res2: [B, C, H/4, W/4], ...}."""
        maps = super().forward(x)
        return {r: maps[p] for p, r in self._names.items()}
