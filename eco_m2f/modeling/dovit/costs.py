"""GFLOPs of a DoViT from the number of tokens in each layer, in the paper's convention (`evaluation/flops.py`)."""

from collections.abc import Sequence
from math import prod

from torch import nn

from ...evaluation.flops import module_flops
from .vit import TokenPassViT


class TokenCosts:
    """Costs of one image of any size. Nothing is run but parts of the model, on tensors without values."""

    def __init__(self, backbone: TokenPassViT, head: nn.Module, auxiliary_heads: Sequence[nn.Module], num_classes: int):
        self._backbone, self._head, self._auxiliary = backbone, head, list(auxiliary_heads)
        self._num_classes = num_classes
        self._measured: dict[tuple[int, int], tuple[int, int]] = {}
        # A layer costs a n + b n^2 for n tokens: linear maps and norms, and attention.
        one, two = (module_flops(backbone.blocks[0], (n, backbone.dim)) for n in (1, 2))
        self._square = (two - 2 * one) // 2
        self._linear = one - self._square

    def __call__(
        self, padded_size: tuple[int, int], output_size: tuple[int, int], kept: Sequence[int] | None = None
    ) -> float:
        """
        Args:
            padded_size: (height, width) of the image as the backbone gets it; output_size: of the result.
            kept: how many tokens, without cls, go on after each decision point; None: the static model, which decides
                nothing and has no auxiliary heads.
        """
        tokens = prod(padded_size) // self._backbone.patch_size**2
        running = [tokens, *(kept if kept is not None else [tokens] * self._backbone.num_decisions)]
        layers = sum(len(stage) * self.layer(1 + n) for stage, n in zip(self._backbone.stages, running, strict=True))
        static, auxiliary = self.around(tuple(padded_size))
        resizing = 4 * self._num_classes * (prod(padded_size) + prod(output_size))
        return (layers + static + resizing + (auxiliary if kept is not None else 0)) / 1e9

    def layer(self, tokens: int) -> int:
        """FLOPs of one layer."""
        return self._linear * tokens + self._square * tokens**2

    def around(self, size: tuple[int, int]) -> tuple[int, int]:
        """FLOPs of what surrounds the layers: patch embedding, last norm and head; and of the auxiliary heads."""
        if size not in self._measured:
            self._measured[size] = self._measure(size)
        return self._measured[size]

    def _measure(self, size: tuple[int, int]) -> tuple[int, int]:
        vit = self._backbone
        height, width = (n // vit.patch_size for n in size)
        token_map = (1, vit.dim, height, width)
        static = module_flops(vit.patch_embed, (1, 3, *size)) + module_flops(vit.norm, (1 + height * width, vit.dim))
        static += module_flops(self._head, token_map)
        return static, sum(module_flops(head, token_map) for head in self._auxiliary)
