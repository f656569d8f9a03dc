"""Mask2Former's `D2SwinTransformer`: an adapter over detectron2's own SwinTransformer.

detectron2's parameters already have the published names. The adapter changes the names of the maps (res2..res5) and the
size divisibility. Stochastic depth comes from torchvision instead of timm. For speed, attention is one operator, and
the masks of shifted windows take fewer passes; torch.compile accepts both.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer):
    """A Swin with maps res2..res5 (strides 4..32), built from MODEL.SWIN.

    MODEL.BACKBONE.FREEZE_AT: 0 freezes nothing, 1 the stem, 2 also res2, and so on.
    """

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
            frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,  # detectron2's Swin freezes the stem at 0
            use_checkpoint=s.USE_CHECKPOINT,
        )
        self.layers = nn.ModuleList(Stage(layer) for layer in self.layers)
        self._set_drop_path(s.DROP_PATH_RATE)
        self._rename_maps(s.OUT_FEATURES)

    def _set_drop_path(self, rate: float) -> None:
        """Adds stochastic depth; its rate rises linearly from 0 to `rate` over all blocks."""
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
        """In pixels. detectron2's own property reads an attribute that its constructor misspells."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {res2: [B, C, H/4, W/4], ...}."""
        maps = super().forward(x)
        return {r: maps[p] for p, r in self._names.items()}


class Stage(nn.Module):
    """The blocks of one stride, and the patch merging after them."""

    def __init__(self, layer: nn.Module):
        """Takes the parts of detectron2's `BasicLayer`, under their names."""
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint = (
            layer.window_size,
            layer.shift_size,
            layer.use_checkpoint,
        )
        self.blocks, self.downsample = layer.blocks, layer.downsample
        for block in self.blocks:
            block.attn = WindowAttention(block.attn)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        """x [B, height * width, C] -> (x, height, width) after the blocks, and the same three after merging."""
        mask = shifted_window_mask(height, width, self.window_size, self.shift_size, x.device)  # [W, N, N]
        for block in self.blocks:
            block.H, block.W = height, width
            x = checkpoint(block, x, mask, use_reentrant=False) if self.use_checkpoint else block(x, mask)
        if self.downsample is None:
            return x, height, width, x, height, width
        return x, height, width, self.downsample(x, height, width), (height + 1) // 2, (width + 1) // 2


def shifted_window_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The masks [W, N, N] of W windows, N = window^2: -100 between places that are no neighbours in the image, else 0.

    The map is padded to whole windows and rolled up and left by `shift`. Its last windows hold two sides of the map.
    """
    rows, columns = (
        torch.bucketize(
            torch.arange(size, device=device), torch.tensor([size - window, size - shift], device=device), right=True
        ).view(-1, window)
        for size in (-(-height // window) * window, -(-width // window) * window)
    )
    region = (3 * rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # [W, N]
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Attention within windows, with a bias per pair of places, by scaled_dot_product_attention.

    On a CPU in float32 this saves a quarter of Swin-T's time.
    """

    def __init__(self, attn: nn.Module):
        """Takes the parameters of detectron2's `WindowAttention`, under their names."""
        super().__init__()
        self.num_heads, self.scale = attn.num_heads, attn.scale
        self.qkv, self.proj = attn.qkv, attn.proj
        self.relative_position_bias_table = attn.relative_position_bias_table  # [(2w-1)^2, M]
        self.register_buffer("relative_position_index", attn.relative_position_index)  # [N, N], N = w^2
        self.dropout, self.proj_drop = attn.attn_drop.p, attn.proj_drop

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B*W, N, C], the windows of one image after another.
            mask: [W, N, N], added to the products of queries and keys; or None.

        Returns:
            [B*W, N, C].
        """
        windows, n, _ = x.shape
        q, k, v = self.qkv(x).view(windows, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B*W, M, N, C/M]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()].view(1, n, n, -1)
        bias = bias.permute(0, 3, 1, 2)  # [1, M, N, N]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(windows // len(mask), 1, 1, 1)  # [B*W, M, N, N]
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).expand(windows, -1, -1, -1), p, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
