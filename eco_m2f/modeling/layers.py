"""Small layers shared by encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half precision widened to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, [B, N, h, w] -> [B, N, *size], float32 at least."""
    return F.interpolate(at_least_float32(maps), size=size, mode="bilinear", align_corners=False)


def pixel_centres(height: int, width: int, device, dtype) -> Tensor:
    """The centres of a map's pixels as (x, y) in [0, 1], row by row -> [height * width, 2]."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(height * width, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them; parameters `layers.N.{weight,bias}`."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, num_layers: int):
        super().__init__()
        dims = [dim_in] + [dim_hidden] * (num_layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def sine_position(height: int, width: int, dim: int, device: torch.device, temperature: float = 10000.0) -> Tensor:
    """Sine position code of a map without padding -> [1, dim, height, width], float32.

    The first half of the channels codes y, the second half x. Each has dim / 2 frequencies, with sine and cosine
    interleaved. Coordinates are 1-based and scaled to (0, 2 pi] (DETR, section A.4).
    """
    half = dim // 2
    period = _periods(half, device, temperature)
    code = [_axis_code(n, period) for n in (height, width)]  # [n, half]
    y = code[0][:, None, :].expand(height, width, half)
    x = code[1][None, :, :].expand(height, width, half)
    return torch.cat((y, x), dim=2).permute(2, 0, 1)[None]  # [1, dim, height, width]


def padded_sine_position(padding: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """`sine_position` for padded maps: the coordinates of each image's own part are scaled to (0, 2 pi].

    padding: [B, h, w] bool, True where there is no image -> [B, dim, h, w], float32.
    """
    period = _periods(dim // 2, padding.device, temperature)
    codes = []
    for axis in (1, 2):
        position = (~padding).cumsum(axis, dtype=torch.float32)  # [B, h, w]
        last = position.narrow(axis, position.shape[axis] - 1, 1)
        codes.append(_waves((position / (last + 1e-6) * 2 * torch.pi)[..., None] / period))  # [B, h, w, dim / 2]
    return torch.cat(codes, dim=3).permute(0, 3, 1, 2)


def _periods(half: int, device: torch.device, temperature: float) -> Tensor:
    pair = torch.div(torch.arange(half, device=device, dtype=torch.float32), 2, rounding_mode="floor")
    return temperature ** (2 * pair / half)


def _axis_code(size: int, period: Tensor) -> Tensor:
    position = torch.arange(1, size + 1, device=period.device, dtype=torch.float32)
    return _waves((position / (size + 1e-6) * 2 * torch.pi)[:, None] / period)


def _waves(angle: Tensor) -> Tensor:
    """Sine of the even entries of the last axis, cosine of the odd ones."""
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


def attend(attn: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Multi-head attention with the parameters of `attn`, by scaled_dot_product_attention.

    `nn.MultiheadAttention` has the published parameter names, but needs a mask per head. Here all heads share one mask,
    which takes an eighth of the memory.

    Args:
        query: [B, Q, C]; key, value: [B, S, C].
        allowed: [B, Q or 1, S] bool, True where a query may look; None: everywhere.

    Returns:
        [B, Q, C].
    """
    dim = query.shape[-1]
    w_q, w_k, w_v = attn.in_proj_weight.split(dim)
    b_q, b_k, b_v = attn.in_proj_bias.split(dim)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)  # [B, M, L, D]
        for x, w, b in ((query, w_q, b_q), (key, w_k, b_k), (value, w_v, b_v))
    )
    mask = None if allowed is None else allowed[:, None]  # [B, 1, Q or 1, S]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=attn.dropout if attn.training else 0.0)
    return attn.out_proj(out.transpose(1, 2).flatten(2))


def xavier_matrices_(module: nn.Module) -> None:
    """Initialises each parameter of two or more dimensions as Xavier-uniform."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
