"""A budget (beta, K, loss) becomes a gate: one linear layer from pooled backbone features to exits (Eq. 6)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .exits import GATE_LOSSES, check_beta, check_exits
from .files import atomic_write

GATE_FORMAT = "eco_m2f.gate.v1"


@dataclass
class Gate:
    """A fitted gate g = W z + b, saved alone beside the parent it was fitted for.

    weight: [E', C] float32; bias: [E']; exits: the E' layer numbers it chooses from, the largest being K = max_exit.
    feature_source: the map that z is pooled from, "res5" or "projected". parent_sha256: see `derived.parent_sha256`.
    fit: how it was fitted (optimizer, seed, ...). results: what was measured with it, such as PQ and GFLOPs.
    """

    weight: Tensor
    bias: Tensor
    exits: tuple[int, ...]
    beta: float
    loss: str
    feature_source: str
    parent_sha256: str
    fit: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def __post_init__(self):
        self.exits = check_exits(self.exits)
        check_beta(self.beta)
        if self.loss not in GATE_LOSSES:
            raise ValueError(f"unknown gate loss {self.loss!r}: choose one of {', '.join(GATE_LOSSES)}")
        shapes = list(self.weight.shape), list(self.bias.shape)
        if self.weight.dim() != 2 or self.weight.shape[0] != len(self.exits) or shapes[1] != [len(self.exits)]:
            raise ValueError(f"a gate over exits {self.exits} needs weight [E, C] and bias [E], not {shapes}")
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("the gate's weights are not finite: its fit diverged; lower the learning rate or raise l2")

    @property
    def max_exit(self) -> int:
        """The paper's K."""
        return self.exits[-1]

    def logits(self, z: Tensor) -> Tensor:
        """z [B, C] -> [B, E']."""
        return torch.nn.functional.linear(z, self.weight.to(z), self.bias.to(z))

    def choose(self, z: Tensor) -> Tensor:
        """z [B, C] -> exits (layer numbers), int64 [B]; ties go to the smaller exit."""
        return torch.tensor(self.exits, device=z.device)[self.logits(z).argmax(dim=1)]

    def save(self, path: str | Path) -> None:
        """Writes the gate whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save({"format": GATE_FORMAT, **asdict(self)}, file)

    @classmethod
    def load(cls, path: str | Path) -> "Gate":
        """Raises FileNotFoundError, or ValueError for a file that is not a gate."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no gate at {str(path)!r}: fit one with tools/train_gate.py")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping) or content.get("format") != GATE_FORMAT:
            raise ValueError(f"{path} is not a gate file of format {GATE_FORMAT}: fit one with tools/train_gate.py")
        return cls(**{name: value for name, value in content.items() if name != "format"})
