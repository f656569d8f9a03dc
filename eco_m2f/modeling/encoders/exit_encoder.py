"""The base of encoders with exits: a run stops at each exit and goes on from there.

    state = encoder.start(maps, pos)
    state, maps = encoder.advance(state, 2)
    state, maps = encoder.advance(state.take(torch.tensor([0, 3])), 3)

`encoder(maps, pos, exits)` consists of these steps. A subclass writes `step`, and also `start` where its layers do not
refine maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor, nn

from .registry import wanted_exits


@dataclass(frozen=True)
class EncoderState:
    """The state of a run. A subclass adds the fields that the next layers read; tensors have the batch first."""

    exit: int  # the exit reached, 0 before the first layer

    def take(self, rows: Tensor) -> EncoderState:
        """The state of only these images of the batch; see `take_rows`."""
        return replace(self, **{f.name: take_rows(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True)
class MapState(EncoderState):
    """The state of an encoder whose layers refine maps."""

    maps: list[Tensor]  # [B, C, h, w] each, coarse to fine
    pos: list[Tensor]  # [1 or B, C, h, w] each


def take_rows(value, rows: Tensor):
    """Takes these rows of each tensor [B, ...] in a tensor, list, tuple or state.

    rows: [n], int64, at least one, ascending. A tensor of one row serves all images and stays as it is. All tensors
    stay as they are if n = B.
    """
    if isinstance(value, Tensor):
        return value if len(value) in (1, len(rows)) else value[rows]
    if isinstance(value, list | tuple):
        return type(value)(take_rows(v, rows) for v in value)
    return value.take(rows) if isinstance(value, EncoderState) else value


class ExitEncoder(nn.Module):
    """The base of all encoders. A subclass sets `exits`, ascending; see `TRANSFORMER_ENCODER_REGISTRY`."""

    exits: tuple[int, ...]

    def start(self, maps: Sequence[Tensor], pos: Sequence[Tensor]) -> EncoderState:
        """The state before the first layer. maps and pos: [B, C, h, w] each, coarse to fine; pos may have B = 1."""
        return MapState(0, list(maps), list(pos))

    def advance(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        """Runs the layers from a state to an exit -> (the state there, the maps of that exit).

        The given state does not change. Raises ValueError if the encoder does not offer the exit, or the run has passed
        it.
        """
        if exit not in self.exits or exit <= state.exit:
            raise ValueError(f"exit {exit} asked of a run at {state.exit}; the encoder offers exits {list(self.exits)}")
        return self.step(state, exit)

    def step(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        """As `advance`, which checks `exit` before."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor], pos: Sequence[Tensor], exits: Sequence[int]) -> dict[int, list[Tensor]]:
        """See `TRANSFORMER_ENCODER_REGISTRY` for the contract."""
        return self.run(self.start(maps, pos), exits)

    def run(self, state: EncoderState, exits: Sequence[int]) -> dict[int, list[Tensor]]:
        """{exit: maps}; the run goes from each exit on to the next."""
        out = {}
        for k in sorted(wanted_exits(exits, self.exits)):
            state, out[k] = self.advance(state, k)
        return out
