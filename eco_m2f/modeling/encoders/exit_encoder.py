"""What every encoder with exits is: a run that stops at each exit and goes on from there.

    state = encoder.start(maps, pos)
    state, maps = encoder.advance(state, 2)
    state, maps = encoder.advance(state.take(torch.tensor([0, 3])), 3)

`encoder(maps, pos, exits)` is made of these steps. A subclass writes `step`, and `start` where its layers go on from
something other than maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor, nn

from .registry import wanted_exits


@dataclass(frozen=True)
class EncoderState:
    """How far a run has come. What its next layers read are the fields of a subclass; tensors have the batch first."""

    exit: int  # the exit reached, 0 before the first layer

    def take(self, rows: Tensor) -> EncoderState:
        """The state of these images of the batch alone; see `take_rows`."""
        return replace(self, **{f.name: take_rows(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True)
class MapState(EncoderState):
    """The state of an encoder whose layers refine maps."""

    maps: list[Tensor]  # [B, C, h, w] each, coarse to fine
    pos: list[Tensor]  # [1 or B, C, h, w] each


def take_rows(value, rows: Tensor):
    """These rows [n] (int64, at least one, ascending) of every tensor [B, ...] in a tensor, list, tuple or state.

    A tensor with one row serves all images, and is kept as it is. So is everything where all rows are taken.
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

        The state that was given stays as it was. Raises ValueError for an exit that the encoder does not offer, or
        that does not lie ahead.
        """
        if exit not in self.exits or exit <= state.exit:
            raise ValueError(f"exit {exit} asked of a run at {state.exit}; the encoder offers exits {list(self.exits)}")
        return self.step(state, exit)

    def step(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        """See `advance`, which has checked `exit`."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor], pos: Sequence[Tensor], exits: Sequence[int]) -> dict[int, list[Tensor]]:
        """See `TRANSFORMER_ENCODER_REGISTRY` for the contract."""
        return self.run(self.start(maps, pos), exits)

    def run(self, state: EncoderState, exits: Sequence[int]) -> dict[int, list[Tensor]]:
        """{exit: maps} of the exits, each gone on to from the one before."""
        out = {}
        for k in sorted(wanted_exits(exits, self.exits)):
            state, out[k] = self.advance(state, k)
        return out
