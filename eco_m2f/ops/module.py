"""The attention module around the op: it projects, predicts sampling points, and samples."""

import math

import torch
from torch import Tensor, nn

from .extension import compiled_backends
from .fused import ms_deform_attn_fused
from .ms_deform_attn import flat_shapes, ms_deform_attn

# One pass takes two thirds of the time of PyTorch's softmax and locations followed by the op (tools/benchmarks/op.py
# --from-logits). It has not been measured on a GPU.
ONE_PASS_ON_CPU = "cpu" in compiled_backends()


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159), with Mask2Former's parameter names.

    Args:
        embed_dim: C, channels of query and value; a multiple of num_heads.
        num_levels: L, the number of maps.
        num_heads: M.
        num_points: P, sampling points per head and level.
    """

    def __init__(self, embed_dim: int = 256, num_levels: int = 3, num_heads: int = 8, num_points: int = 4):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = embed_dim, num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks along the angle 2 pi m / M; point p is p + 1 pixels away (on a square, not a circle)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # [M, 2]
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes) -> Tensor:
        """Samples value around each query's reference point.

        Args:
            query: [N, Lq, C], content plus position.
            reference_points: [N or 1, Lq, L or 1, 2], (x, y) in [0, 1].
            value: [N, S, C], S = sum of h * w.
            spatial_shapes: [(h, w), ...] host ints, one per level.

        Returns:
            [N, Lq, C].
        """
        shapes = flat_shapes(spatial_shapes)
        if not torch.jit.is_tracing():  # sizes are tensors in a trace, and each comparison would warn
            self._check(query, reference_points, value, shapes)
        batch, queries, _ = query.shape
        values = self.value_proj(value).view(batch, -1, self.num_heads, self.embed_dim // self.num_heads)
        logits = self.attention_weights(query).view(batch, queries, self.num_heads, self.num_levels, self.num_points)
        # A trace, as fvcore makes, shows the plain op and the operators before it.
        if ONE_PASS_ON_CPU and values.is_cpu and not torch.jit.is_tracing():
            sampled = self._in_one_pass(query, reference_points, values, logits, shapes)
        else:
            weights = logits.flatten(3).softmax(-1).view(logits.shape).to(values.dtype)
            locations = self.sampling_locations(query, reference_points, shapes)
            sampled = ms_deform_attn(values, shapes, locations, weights)  # [N, Lq, C]
        return self.output_proj(sampled)

    def _in_one_pass(self, query, reference_points, values, logits, shapes) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        offsets = self.offsets(query).view(*logits.shape, 2)  # [N, Lq, M, L, P, 2]
        arguments = (offsets.to(wide), logits.to(wide), reference_points.to(wide))
        return ms_deform_attn_fused(values, shapes, *arguments)

    def offsets(self, query: Tensor) -> Tensor:
        """In pixels, [N, Lq, M * L * P * 2]. Without autocast, because coordinates need full precision."""
        if query.is_meta:  # `costs` uses meta, which autocast does not know
            return self.sampling_offsets(query)
        with torch.autocast(query.device.type, enabled=False):
            return self.sampling_offsets(query.to(self.sampling_offsets.weight.dtype))

    def sampling_locations(self, query: Tensor, reference_points: Tensor, shapes: list[int]) -> Tensor:
        """Reference point + predicted offset in pixels / (w, h): [N, Lq, M, L, P, 2], float32 or float64."""
        batch, queries, _ = query.shape
        offsets = self.offsets(query).view(batch, queries, self.num_heads, self.num_levels, self.num_points, 2)
        precision = torch.promote_types(offsets.dtype, torch.float32)
        # Filled on the device, because a copy from the host can wait for the device.
        sizes = [reference_points.new_full((1,), shapes[i ^ 1], dtype=precision) for i in range(len(shapes))]
        sizes = torch.cat(sizes).view(self.num_levels, 1, 2)  # [L, 1, 2], (w, h) per level
        return reference_points[:, :, None, :, None].to(precision) + offsets.to(precision) / sizes

    def _check(self, query: Tensor, reference_points: Tensor, value: Tensor, shapes: list[int]) -> None:
        if len(shapes) != 2 * self.num_levels:
            raise ValueError(f"spatial_shapes {shapes} must name (h, w) for num_levels {self.num_levels}")
        if query.dim() != 3 or query.shape[-1] != self.embed_dim or value.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query {tuple(query.shape)} and value {tuple(value.shape)} must be [N, tokens, {self.embed_dim}]"
            )
        if reference_points.dim() != 4 or reference_points.shape[1] != query.shape[1]:
            raise ValueError(
                f"reference_points {tuple(reference_points.shape)} must be [N or 1, {query.shape[1]}, L or 1, 2]"
            )
