"""The gate: one linear layer from pooled backbone features to exits (Eq. 6), and its file."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from ..exits import FEATURE_SOURCES, GATE_LOSSES, check_beta, check_exits
from .file import read_gate, write_gate


@dataclass
class Gate:
    """A fitted gate g = W z + b. Its file is separate from the parent's checkpoint.

    exits: the E' layer numbers that it chooses from; the largest is K = max_exit. feature_source: the map that z is
    pooled from, "res5" or "projected". parent_sha256: digest of the parent that it was fitted for, see
    `checkpoint.parent_hash`. fit: how it was fitted (optimizer, seed, ...). results: its quality and GFLOPs on a
    derived dataset. Both hold plain values. Raises ValueError for invalid values.
    """

    weight: Tensor  # [E', C] float32
    bias: Tensor  # [E'] float32
    exits: tuple[int, ...]
    beta: float
    loss: str
    feature_source: str
    parent_sha256: str
    fit: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.exits, list | tuple) or not all(type(k) is int for k in self.exits):
            raise ValueError(f"exits must be positive layer numbers in increasing order, not {self.exits!r}")
        self.exits = check_exits(self.exits)
        if type(self.beta) not in (int, float):
            raise ValueError(f"beta must be a finite number >= 0, not {self.beta!r}")
        check_beta(self.beta)
        for name, known in (("loss", tuple(GATE_LOSSES)), ("feature_source", FEATURE_SOURCES)):
            if getattr(self, name) not in known:
                what = "gate loss" if name == "loss" else name
                raise ValueError(f"unknown {what} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if not (isinstance(self.parent_sha256, str) and re.fullmatch("[0-9a-f]{64}", self.parent_sha256)):
            raise ValueError(f"parent_sha256 must be 64 hexadecimal digits, not {self.parent_sha256!r}")
        if not (isinstance(self.fit, dict) and isinstance(self.results, dict)):
            raise ValueError(f"fit and results must be dicts, not {type(self.fit)} and {type(self.results)}")
        self._check_tensors()

    def _check_tensors(self) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name)
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
            if not dense or value.dtype != torch.float32:
                found = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value)
                raise ValueError(f"{name} must be a dense float32 tensor, not {found}")
        shapes = list(self.weight.shape), list(self.bias.shape)
        fits = self.weight.dim() == 2 and self.weight.numel() and self.weight.shape[0] == len(self.exits)
        if not fits or shapes[1] != [len(self.exits)]:
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
        """z [B, C] -> exits, int64 [B]."""
        return self.exits_of(self.logits(z))

    def exits_of(self, logits: Tensor) -> Tensor:
        """logits [B, E'] -> exits (layer numbers), int64 [B]; ties go to the smaller exit."""
        return torch.tensor(self.exits, device=logits.device)[logits.argmax(dim=1)]

    def save(self, path: str | Path) -> None:
        """Writes the gate whole or not at all: as .safetensors if the name ends so, else as PyTorch's archive."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gate(path, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> "Gate":
        """Raises FileNotFoundError, or ValueError for a file that is no gate or was changed after it was written."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no gate at {str(path)!r}: fit one with tools/train_gate.py")
        content = read_gate(Path(path))
        names = {f.name for f in fields(cls)}
        if content.keys() != names:
            lacking, unknown = sorted(names - content.keys()), sorted(map(str, content.keys() - names))
            raise ValueError(f"{path} is no gate file: it lacks {lacking} and has unknown fields {unknown}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
