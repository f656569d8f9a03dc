"""GFLOPs of a DoViT from the number of tokens in each layer. The convention is that of `exits.py`."""

import csv
import os
from collections.abc import Mapping, Sequence
from math import prod

from torch import nn

from .closed_form import SizeCounts, SizeFunctions
from .table import CONVENTION, CostTable
from .tape import module_flops


class TokenCosts:
    """The costs of one image of any size. Only parts of the model run, on tensors without values."""

    def __init__(self, backbone: nn.Module, head: nn.Module, auxiliary_heads: Sequence[nn.Module], num_classes: int):
        """backbone: a `TokenPassViT`; the others as in `DoViT`."""
        self._backbone, self._head, self._auxiliary = backbone, head, list(auxiliary_heads)
        self._num_classes = num_classes
        patch = self.size_divisibility = backbone.patch_size
        self._around = SizeCounts(self.around, SizeFunctions([patch], squared=[patch]), patch)
        # A layer costs a n + b n^2 for n tokens: a n for linear maps and norms, b n^2 for attention.
        one, two = (module_flops(backbone.blocks[0], (n, backbone.dim)) for n in (1, 2))
        self._square = (two - 2 * one) // 2
        self._linear = one - self._square

    @classmethod
    def of(cls, model: nn.Module) -> "TokenCosts":
        """The costs of a `DoViT`, by its present architecture."""
        return cls(model.backbone, model.head, model.auxiliary_heads, model.num_classes)

    def __call__(
        self, padded_size: tuple[int, int], output_size: tuple[int, int], kept: Sequence[int] | None = None
    ) -> float:
        """The GFLOPs of an image; arguments as in `parts`."""
        return self.parts(padded_size, output_size, kept)["total"]

    def parts(
        self, padded_size: Sequence[int], output_size: Sequence[int], kept: Sequence[float] | None = None
    ) -> dict[str, float]:
        """GFLOPs of an image: "total", "backbone", "head", "auxiliary_heads" and "postprocessing" (resizing).

        Args:
            padded_size: (height, width) of the backbone's input; output_size: of the result.
            kept: the number of tokens, without cls, that go on after each decision point; None: the static model, whose
                auxiliary heads do not run.
        """
        tokens = self.tokens(padded_size)
        running = [tokens, *(kept if kept is not None else [tokens] * self._backbone.num_decisions)]
        layers = sum(len(stage) * self.layer(1 + n) for stage, n in zip(self._backbone.stages, running, strict=True))
        around, head, auxiliary = self._around(tuple(padded_size))
        flops = {
            "backbone": layers + around,
            "head": head,
            "auxiliary_heads": auxiliary if kept is not None else 0,
            "postprocessing": 4 * self._num_classes * (prod(padded_size) + prod(output_size)),
        }
        return {name: value / 1e9 for name, value in {"total": sum(flops.values()), **flops}.items()}

    def tokens(self, padded_size: Sequence[int]) -> int:
        """The number of tokens of an image, without cls."""
        return prod(padded_size) // self._backbone.patch_size**2

    def layer(self, tokens: float) -> float:
        """FLOPs of one layer."""
        return self._linear * tokens + self._square * tokens**2

    def around(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """FLOPs outside the layers: of patch embedding and last norm, of the head, of the auxiliary heads."""
        vit = self._backbone
        height, width = (n // vit.patch_size for n in size)
        token_map = (1, vit.dim, height, width)
        around = module_flops(vit.patch_embed, (1, 3, *size)) + module_flops(vit.norm, (1 + height * width, vit.dim))
        auxiliary = sum(module_flops(head, token_map) for head in self._auxiliary)
        return around, module_flops(self._head, token_map), auxiliary


class TokenTable(CostTable):
    """Costs of the static model, and of given shares of tokens that go on after each decision point."""

    key, column = "tokens", "tokens"
    convention = {
        "unit": CONVENTION["unit"],
        "tokens": "static, or the shares that go on after each decision point",
    }

    def __init__(self, model: nn.Module, shares: Mapping[str, Sequence[float]]):
        """
        Args:
            model: a `DoViT`.
            shares: by name, shares of an image's tokens; each is at most the one before.

        Raises:
            ValueError: not one share per decision point, or a share that is not in [0, 1] or exceeds the one before.
        """
        num_decisions = model.backbone.num_decisions
        for name, kept in shares.items():
            if (
                len(kept) != num_decisions
                or list(kept) != sorted(kept, reverse=True)
                or not 0 <= kept[-1] <= kept[0] <= 1
            ):
                raise ValueError(
                    f"{name}: the shares of the tokens that go on, {list(kept)}, must be {num_decisions} numbers (one "
                    "per decision point) from 1 down to 0, none above the one before it"
                )
        self._costs, self._shares = TokenCosts.of(model), dict(shares)

    def details(self, padded_size: Sequence[int], output_size: Sequence[int] | None = None) -> dict:
        output = padded_size if output_size is None else output_size
        tokens = self._costs.tokens(padded_size)
        kept = {name: [tokens * share for share in shares] for name, shares in self._shares.items()}
        return {name: self._costs.parts(padded_size, output, k) for name, k in {"static": None, **kept}.items()}


def read_shares(path: str | os.PathLike) -> dict[str, list[float]]:
    """The shares in a table of tools/sweep_thresholds.py, by dataset and threshold, without static rows.

    Raises:
        OSError: the file cannot be opened. ValueError: it is no such table.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    shares = {}
    for row in rows:
        try:
            kept = [float(value) / 100 for name, value in row.items() if name.startswith("kept@")]
            if float(row["threshold"]) < 1:
                shares[f"{row['dataset']} at {row['threshold']}"] = kept
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no table of tools/sweep_thresholds.py: {error!r} in {row}") from error
    if not shares:
        raise ValueError(f"{path} has no row with a threshold below 1, so no shares of tokens")
    return shares
