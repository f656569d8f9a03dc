"""RT-M2F's encoder: attention within the coarsest map, convolutions across scales (RT-DETR, arXiv 2304.08069).

The position code differs from the original, which lays it out by columns while tokens lie by rows. On square maps both
codes agree; on other maps only the code here fits. There is one transformer layer, so there is no early exit.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import xavier_matrices_
from .dense import EncoderLayer
from .exit_encoder import ExitEncoder, MapState
from .registry import TRANSFORMER_ENCODER_REGISTRY

NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


@TRANSFORMER_ENCODER_REGISTRY.register()
class HybridEncoder(ExitEncoder):
    """Its only exit comes after all attention layers, because the convolutions across scales need their result."""

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int = 1,
        num_levels: int = 3,
        num_heads: int = 8,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        norm: str = "BN",
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"an encoder needs at least one layer, got {num_layers}: set TRANSFORMER_ENC_LAYERS")
        if norm not in NORMS:
            raise ValueError(f"MODEL.HYBRID.NORM {norm!r} is unknown; use {' or '.join(NORMS)}")
        if dim % 4:
            raise ValueError(f"CONVS_DIM {dim} must be a multiple of 4: sine and cosine of width and height")
        self.dim, self.norm = dim, NORMS[norm]
        self.exits = (num_layers,)
        self.encoder = nn.Module()  # a plain holder: layers have the same names in every encoder
        self.encoder.layers = nn.ModuleList(
            EncoderLayer(dim, num_heads, dim_feedforward, dropout, F.gelu) for _ in range(num_layers)
        )
        xavier_matrices_(self.encoder)
        steps = range(num_levels - 1)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1, self.norm) for _ in steps)
        self.fpn_blocks = nn.ModuleList(CSPRepLayer(2 * dim, dim, self.norm) for _ in steps)
        self.downsample_convs = nn.ModuleList(ConvNorm(dim, dim, 3, self.norm, stride=2) for _ in steps)
        self.pan_blocks = nn.ModuleList(CSPRepLayer(2 * dim, dim, self.norm) for _ in steps)

    @classmethod
    def from_config(cls, cfg) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "dim": head.CONVS_DIM,
            "num_layers": head.TRANSFORMER_ENC_LAYERS,
            "num_levels": len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
            "num_heads": cfg.MODEL.MASK_FORMER.NHEADS,
            "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "norm": cfg.MODEL.HYBRID.NORM,
        }

    def input_projection(self, in_channels: int) -> nn.Sequential:
        """See `TRANSFORMER_ENCODER_REGISTRY`."""
        return nn.Sequential(nn.Conv2d(in_channels, self.dim, 1, bias=False), self.norm(self.dim))

    def start(self, maps: Sequence[Tensor], pos: Sequence[Tensor]) -> MapState:
        """Each map must have twice the height and width of the one before.

        pos is not read: the coarsest map has a position code of another form here, and the others need none.
        """
        sizes = [tuple(m.shape[-2:]) for m in maps]
        if any(fine != (2 * h, 2 * w) for (h, w), fine in zip(sizes, sizes[1:])):
            raise ValueError(
                f"HybridEncoder needs maps that double in size from one to the next, not {sizes}: take a backbone "
                "whose strides do (RESNETS.RES5_DILATION 1, TIMM.OUTPUT_STRIDE 32), or another encoder"
            )
        return MapState(0, list(maps), pos=[])

    def step(self, state: MapState, exit: int) -> tuple[MapState, list[Tensor]]:
        state = replace(state, exit=exit, maps=[self.within_scale(state.maps[0]), *state.maps[1:]])
        return state, self.across_scales(state.maps)

    def within_scale(self, coarsest: Tensor) -> Tensor:
        """Self-attention within a map: [B, C, h, w] -> [B, C, h, w]."""
        height, width = coarsest.shape[-2:]
        tokens = coarsest.flatten(2).transpose(1, 2)  # [B, h * w, C]
        pos = plane_position(height, width, self.dim, coarsest.device).to(coarsest.dtype)  # [h * w, C]
        for layer in self.encoder.layers:
            tokens = layer(tokens, pos)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def across_scales(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """From the coarsest map to the finest and back. maps: coarse to fine; the result has the same shapes."""
        down = [maps[0]]  # [B, C, h, w] each
        for lateral, block, finer in zip(self.lateral_convs, self.fpn_blocks, maps[1:]):
            down[-1] = F.silu(lateral(down[-1]))
            down.append(block(torch.cat((doubled(down[-1]), finer), dim=1)))
        up = [down.pop()]
        for downsample, block in zip(self.downsample_convs, self.pan_blocks):
            up.append(block(torch.cat((F.silu(downsample(up[-1])), down.pop()), dim=1)))
        return up[::-1]


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size (at stride 1), and its norm."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, norm: type[nn.Module], stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = norm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that equals this one and its norm in eval mode."""
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - self.norm.running_mean * scale


class RepVGGBlock(nn.Module):
    """SiLU of the sum of a 3x3 and a 1x1 convolution with their norms. `fuse` makes them one 3x3 convolution."""

    def __init__(self, dim: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, norm)
        self.conv2 = ConvNorm(dim, dim, 1, norm)
        self.fused = None

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.fused(x) if self.fused is not None else self.conv1(x) + self.conv2(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Works in place, for inference only. The state dict has other names afterwards."""
        if self.fused is not None:
            return
        if self.training:
            raise RuntimeError("a model in training cannot be fused, its norms still change: call eval() first")
        (weight, bias), (weight_1x1, bias_1x1) = self.conv1.folded(), self.conv2.folded()
        self.fused = nn.Conv2d(*weight.shape[:2], 3, padding=1).to(weight)
        self.fused.weight.copy_(weight + F.pad(weight_1x1, (1, 1, 1, 1)))
        self.fused.bias.copy_(bias + bias_1x1)
        del self.conv1, self.conv2


class CSPRepLayer(nn.Module):
    """The sum of two 1x1 branches; the first also runs through RepVGG blocks."""

    def __init__(self, dim_in: int, dim: int, norm: type[nn.Module], num_blocks: int = 3):
        super().__init__()
        self.conv1 = ConvNorm(dim_in, dim, 1, norm)
        self.conv2 = ConvNorm(dim_in, dim, 1, norm)
        self.bottlenecks = nn.Sequential(*(RepVGGBlock(dim, norm) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.bottlenecks(F.silu(self.conv1(x))) + F.silu(self.conv2(x))


def fuse_for_deployment(model: nn.Module) -> nn.Module:
    """Fuses all RepVGG blocks of a model in eval mode, in place, and returns the model. Results agree to 1e-5."""
    for module in list(model.modules()):
        if isinstance(module, RepVGGBlock):
            module.fuse()
    return model


def plane_position(height: int, width: int, dim: int, device, temperature: float = 10000.0) -> Tensor:
    """Position code of a map's tokens, row by row -> [height * width, dim], float32.

    The quarters of the channels are sine of y, cosine of y, sine of x and cosine of x, in pixels from 0.
    """
    quarter = dim // 4
    frequency = temperature ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    x, y = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency for n in (width, height))
    x = x[None].expand(height, width, quarter)
    y = y[:, None].expand(height, width, quarter)  # [h, w, dim / 4]
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), dim=2).flatten(0, 1)


def doubled(x: Tensor) -> Tensor:
    """Repeats each pixel 2x2: [B, C, h, w] -> [B, C, 2h, 2w]. A copy, because the published GFLOPs do not count it."""
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)
