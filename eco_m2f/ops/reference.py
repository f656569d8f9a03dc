"""Multi-scale deformable attention in plain PyTorch: the fallback without kernels, and the reference for kernels.

For query q and head m: out = sum over levels l and points p of weight[q, m, l, p] * bilinear(value of level l,
location), with zeros outside the map. A location (x, y) in [0, 1] is the pixel (x * w - 0.5, y * h - 0.5) of a level of
h x w. Pixels are a product and then a difference, without fused multiply-add, so all backends choose the same cell.

All backends follow these rules:
- At an exact integer pixel coordinate, the derivative by the location is the one-sided derivative from above.
- Sums are in float32 for a half or bfloat16 value, and the locations are float32.
- Cells outside the map count as zero, and so do points that touch no cell, whatever their neighbours hold.
- A value that is not finite never turns into a number; NaN and infinity may turn into each other:
    - a location: the query's head in the output, and the gradients of this location and its weight, are NaN. Nothing is
      added to the gradient of value;
    - an attention weight: the query's head in the output is not finite, nor are the gradients of the location and of
      the touched cells;
    - a cell of value: the heads of the queries that touch it are not finite, even with a bilinear weight of 0, and no
      others. Nor are the gradients of those points' locations and weights;
    - the output's gradient: the gradients of all locations and weights of the query's head are not finite, nor those of
      the touched cells.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of value in one step: 2**18 indices take 2 MiB. The backward gathers 32 floats for each, which are 32 MiB.
MAX_ROWS = 2**18


def level_table(spatial_shapes: list[int]) -> list[tuple[int, int, int]]:
    """Flat [h0, w0, h1, w1, ...] -> [(h, w, index of the level's first token)]."""
    table, start = [], 0
    for height, width in zip(spatial_shapes[0::2], spatial_shapes[1::2]):
        table.append((height, width, start))
        start += height * width
    return table


class Corners:
    """The four cells around each sampling point, in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1).

    token: [..., 4] int64, the token index within one image; -1 for a cell outside the map.
    weight: [..., 4] bilinear weights, 0 for cells outside the map, NaN if the location is not finite.
    dx, dy: [..., 4] derivatives of weight by the pixel coordinate, with the same 0 and NaN; None without `derivatives`.
    """

    def __init__(self, locations: Tensor, spatial_shapes: list[int], derivatives: bool = False):
        levels = enumerate(level_table(spatial_shapes))
        parts = [self._level(locations[..., i, :, :], *level, derivatives) for i, level in levels]
        stacked = [torch.stack(part, dim=-3) for part in zip(*parts)]
        self.token, self.weight, self.dx, self.dy = stacked if derivatives else (*stacked, None, None)

    @staticmethod
    def _level(locations: Tensor, height: int, width: int, start: int, derivatives: bool) -> tuple[Tensor, ...]:
        x = locations[..., 0] * width - 0.5
        y = locations[..., 1] * height - 0.5
        poison = (x - x) + (y - y)  # 0 for finite coordinates, else NaN
        inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)
        x, y = torch.where(inside, x, 0.0), torch.where(inside, y, 0.0)
        x0, y0 = x.floor(), y.floor()
        fx, fy = x - x0, y - y0
        columns = torch.stack((x0, x0 + 1, x0, x0 + 1), dim=-1).long()
        rows = torch.stack((y0, y0, y0 + 1, y0 + 1), dim=-1).long()
        valid = inside[..., None] & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        token = torch.where(valid, start + rows * width + columns, -1)
        wx, wy = torch.stack((1 - fx, fx, 1 - fx, fx), dim=-1), torch.stack((1 - fy, 1 - fy, fy, fy), dim=-1)
        weights = [wx * wy]
        if derivatives:
            sign = torch.tensor((-1.0, 1.0), dtype=x.dtype, device=x.device)
            weights += [wy * sign[[0, 1, 0, 1]], wx * sign[[0, 0, 1, 1]]]
        return token, *(torch.where(valid, part, 0.0) + poison[..., None] for part in weights)


def reference_ms_deform_attn(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The op by one `embedding_bag` over the rows of value. Arguments as in `ms_deform_attn`; returns [N, Lq, M*D]."""
    batch, tokens, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    compute = torch.promote_types(value.dtype, torch.float32)
    if value.numel() == 0 or sampling_locations.numel() == 0:
        return value.new_zeros(batch, queries, heads * channels)
    rows = _padded_rows(value, compute)
    out = value.new_empty(batch, queries, heads, channels, dtype=compute)
    for part in _query_blocks(sampling_locations):
        corners = Corners(sampling_locations[:, part].to(compute), spatial_shapes)  # [N, q, M, L, P, 4]
        weight = corners.weight * attention_weights[:, part].to(compute)[..., None]
        index = _row_index(corners.token, tokens)
        bags = F.embedding_bag(
            index.flatten(0, 2).flatten(1), rows, per_sample_weights=weight.flatten(0, 2).flatten(1), mode="sum"
        )
        out[:, part] = bags.view(index.shape[:3] + (channels,))
    return out.flatten(2).to(value.dtype)


def _query_blocks(locations: Tensor) -> Iterator[slice]:
    """Ranges of queries that touch about MAX_ROWS rows at most, so their tensors stay in the caches."""
    batch, queries, heads, levels, points = locations.shape[:5]
    step = max(1, MAX_ROWS // (batch * heads * levels * points * 4))
    for begin in range(0, queries, step):
        yield slice(begin, begin + step)


def _padded_rows(value: Tensor, dtype: torch.dtype) -> Tensor:
    """value [N, S, M, D] -> [N*S*M + 1, D]. The last row is zero, for cells outside the map."""
    return F.pad(value.to(dtype).flatten(0, 2), (0, 0, 0, 1))


def _row_index(token: Tensor, tokens: int) -> Tensor:
    """Token indices [N, Lq, M, L, P, 4], -1 for outside -> rows of `_padded_rows`."""
    batch, _, heads = token.shape[:3]
    image = torch.arange(batch, device=token.device).view(-1, 1, 1, 1, 1, 1)
    head = torch.arange(heads, device=token.device).view(1, 1, -1, 1, 1, 1)
    return torch.where(token < 0, batch * tokens * heads, (image * tokens + token) * heads + head)


def reference_ms_deform_attn_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights. Queries run in blocks, to bound the memory."""
    batch, tokens, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    compute = torch.promote_types(value.dtype, torch.float32)
    rows = _padded_rows(value, compute)
    grad_rows = torch.zeros_like(rows)
    grad_locations = torch.zeros_like(sampling_locations, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(attention_weights, memory_format=torch.contiguous_format)
    grad_output = grad_output.to(compute).reshape(batch, queries, heads, channels)
    for part in _query_blocks(sampling_locations) if value.numel() and sampling_locations.numel() else ():
        _backward_part(
            grad_output[:, part], rows, tokens, spatial_shapes,
            sampling_locations[:, part].to(compute), attention_weights[:, part].to(compute),
            grad_rows, grad_locations[:, part], grad_weights[:, part],
        )  # fmt: skip
    return grad_rows[:-1].view(value.shape).to(value.dtype), grad_locations, grad_weights


def _backward_part(
    grad_output, rows, tokens, spatial_shapes, locations, weights, grad_rows, grad_locations, grad_weights
):  # fmt: skip
    """Adds these queries' gradients into grad_rows and writes grad_locations and grad_weights."""
    corners = Corners(locations, spatial_shapes, derivatives=True)
    index = _row_index(corners.token, tokens)
    spread = (corners.weight * weights[..., None])[..., None] * grad_output[:, :, :, None, None, None]
    grad_rows.index_add_(0, index.flatten(), spread.flatten(0, -2))  # spread: [N, q, M, L, P, 4, D]
    gathered = rows[index.flatten()].view(*index.shape[:3], -1, rows.shape[1])
    dots = (gathered @ grad_output[..., None]).view(index.shape)  # <value at the corner, grad_output>
    grad_weights.copy_((dots * corners.weight).sum(-1))
    sizes = [[width, height] for height, width, _ in level_table(spatial_shapes)]
    size = torch.tensor(sizes, dtype=weights.dtype, device=weights.device)[:, None]  # [L, 1, 2]
    slope = torch.stack(((dots * corners.dx).sum(-1), (dots * corners.dy).sum(-1)), dim=-1)
    grad_locations.copy_(slope * weights[..., None] * size)


def grid_sample_ms_deform_attn(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The op by one `grid_sample` per level: slow, but only of operators that exporters such as ONNX know.

    It rounds coordinates differently near the edge of a cell, so it is no bitwise reference.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grids = 2 * sampling_locations - 1
    total = 0.0
    for i, (height, width, start) in enumerate(level_table(spatial_shapes)):
        level = value[:, start : start + height * width].flatten(2).transpose(1, 2)  # [N, M*D, h*w]
        level = level.reshape(batch * heads, channels, height, width)  # [N*M, D, h, w]
        grid = grids[:, :, :, i].transpose(1, 2).flatten(0, 1)  # [N*M, Lq, P, 2]
        sampled = F.grid_sample(level, grid.to(level.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = attention_weights[:, :, :, i].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * weight).sum(-1)  # [N*M, D, Lq]
    return total.view(batch, heads * channels, queries).transpose(1, 2).contiguous()
