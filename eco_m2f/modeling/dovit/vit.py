"""A plain vision transformer in which each token may stop early (DoViT).

Layers run on one sequence [T, C]: the running tokens of all images, one image after another. There is no padding, so
each image gets the same result as alone. Parameters have timm's names, so timm's weights load. Unlike timm's
`VisionTransformer` it has neither dropout nor stochastic depth.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (number of the decision point, map of all tokens [B, C, h, w]) -> bool [B, h, w]: the tokens that stop
StopRule = Callable[[int, Tensor], Tensor]
NORM_EPS = 1e-6
SUMMARY_SHARE = 10  # the cls token takes in the mean of the stopped tokens if these are more than this percentage


class TokenPassViT(nn.Module):
    """From images to a map of tokens. At decision points between layers, a rule selects the tokens that stop."""

    def __init__(
        self, *, patch_size: int, dim: int, depth: int, num_heads: int, image_size: int, decision_layers: Sequence[int]
    ):
        """
        Args:
            image_size: the side of the square images that the position code is for, in pixels. Other sizes resize it.
            decision_layers: the number of layers before each decision point, ascending.

        Raises:
            ValueError: sizes do not divide each other, or a decision point is not between two layers.
        """
        super().__init__()
        if image_size % patch_size or dim % num_heads:
            raise ValueError(
                f"MODEL.DOVIT.PATCH_SIZE {patch_size} must divide PRETRAIN_IMG_SIZE {image_size}, and NUM_HEADS "
                f"{num_heads} must divide EMBED_DIM {dim}"
            )
        bounds = [0, *decision_layers, depth]
        if sorted(set(bounds)) != bounds:
            raise ValueError(
                f"MODEL.DOVIT.DECISION_LAYERS {list(decision_layers)} must ascend, above 0 and below DEPTH {depth}"
            )
        side = image_size // patch_size
        self.patch_size, self.dim = patch_size, dim
        self.stages = [range(a, b) for a, b in zip(bounds, bounds[1:])]  # the layers between decision points
        self.patch_embed = PatchEmbedding(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear_layers(self)

    @property
    def num_decisions(self) -> int:
        return len(self.stages) - 1

    def forward(self, images: Tensor, stop: StopRule | None = None) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            images: [B, 3, H, W], H and W multiples of the patch size.
            stop: selects the tokens that stop at a decision point; tokens that have stopped stay stopped. None: all
                tokens pass all layers.

        Returns:
            The normalised map [B, C, h, w] of all tokens, each with its value at its stop or after the last layer. And
            the tokens that go on after each decision point, bool [B, h, w] (an empty list without a rule).
        """
        height, width = (n // self.patch_size for n in images.shape[-2:])
        tokens = self.embed(images)  # [B, 1 + h * w, C]
        kept = torch.ones_like(tokens[:, 1:, 0], dtype=torch.bool)  # [B, h * w]
        passed = []
        for point, stage in enumerate(self.stages):
            if point and stop is not None:
                sure = stop(point - 1, as_map(tokens, height, width))  # [B, h, w]
                kept = kept & ~sure.flatten(1)
                tokens = summarise(tokens, kept)
                passed.append(kept.unflatten(1, (height, width)))
            tokens = run_kept([self.blocks[i] for i in stage], tokens, kept)
        return as_map(self.norm(tokens), height, width), passed

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> tokens with their position code, [B, 1 + h * w, C], the cls token first."""
        patches = self.patch_embed(images)  # [B, C, h, w]
        height, width = patches.shape[-2:]
        tokens = torch.cat((repeated(self.cls_token, len(images)), patches.flatten(2).transpose(1, 2)), dim=1)
        return tokens + resized_positions(self.pos_embed, height, width)


def repeated(parameter: Tensor, times: int) -> Tensor:
    """[1, n, C] -> [times, n, C].

    It expands a tensor without the first axis. Else the gradient for a batch of one would be a part of a larger tensor,
    not laid out as the parameter. Training in several processes copies such gradients.
    """
    return parameter[0].expand(times, -1, -1)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, 1 + h * w, C], the cls token first -> [B, C, h, w]."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))


def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Resizes the position code [1, 1 + s * s, C] of a square map to another size; the cls token's code stays."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (height, width) == (side, side):
        return positions
    square = as_map(positions, side, side).float()
    resized = F.interpolate(square, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat((positions[:, :1], resized.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def summarise(tokens: Tensor, kept: Tensor) -> Tensor:
    """If more than a tenth of an image's tokens have stopped, averages its cls token with their mean.

    The running tokens no longer see the stopped ones; the cls token stands for these. tokens: [B, 1 + N, C]; kept: bool
    [B, N].
    """
    stopped = ~kept[..., None]  # [B, N, 1]
    count = stopped.sum(dim=1)  # [B, 1]
    mean = (tokens[:, 1:] * stopped).sum(dim=1) / count.clamp(min=1)  # [B, C]
    cls = tokens[:, 0]  # [B, C]
    cls = torch.where(100 * count > SUMMARY_SHARE * kept.shape[1], (cls + mean) / 2, cls)
    return torch.cat((cls[:, None], tokens[:, 1:]), dim=1)


def run_kept(layers: Sequence[nn.Module], tokens: Tensor, kept: Tensor) -> Tensor:
    """Runs the kept tokens and the cls tokens through layers and puts them back. The others stay as they are.

    tokens: [B, 1 + N, C]; kept: bool [B, N].
    """
    moving = F.pad(kept, (1, 0), value=True)  # [B, 1 + N]
    lengths = moving.sum(dim=1).tolist()
    flat = tokens.flatten(0, 1)  # [B * (1 + N), C]
    if sum(lengths) == len(flat):
        index, x = None, flat
    else:
        index = moving.flatten().nonzero()[:, 0]
        x = flat[index]  # [T, C]
    for layer in layers:
        x = layer(x, lengths)
    if index is not None:
        x = flat.index_copy(0, index, x.to(flat.dtype))
    return x.view(tokens.shape)


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] -> [B, C, H / p, W / p]."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class Block(nn.Module):
    """A transformer layer with norms before attention and before the MLP. The MLP's hidden width is 4 C."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """x: [T, C], the tokens of one image after another; lengths: the number of each image (default: one image)."""
        x = x + self.attn(self.norm1(x), lengths if lengths is not None else [len(x)])
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention within each image."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x and lengths as in `Block.forward`. Images of equal lengths run together, others in turn."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [T, 3, M, D]
        if len(set(lengths)) == 1:
            groups = [qkv.unflatten(0, (len(lengths), -1))]  # [B, n, 3, M, D]
        else:
            groups = [part[None] for part in qkv.split(list(lengths))]  # [1, n, 3, M, D] each
        attended = [F.scaled_dot_product_attention(*g.permute(2, 0, 3, 1, 4)) for g in groups]  # [b, M, n, D]
        attended = [a.transpose(1, 2).flatten(2).flatten(0, 1) for a in attended]  # [b * n, C]
        return self.proj(torch.cat(attended) if len(attended) > 1 else attended[0])


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def init_linear_layers(module: nn.Module) -> None:
    """Draws the weights of linear layers from a truncated normal distribution of deviation 0.02; biases are 0."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
