"""A policy without training: an image leaves when the encoder hardly changes it any more."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..exits import check_exits, exits_up_to
from .registry import EXIT_POLICY_REGISTRY


@EXIT_POLICY_REGISTRY.register()
class StateChangeExit(nn.Module):
    """An image leaves at the first exit where its maps changed little since the exit before.

    The change is the mean over the image's tokens of |new - old| / |old|, in Euclidean norms. At the first exit, old is
    the encoder's input. The GFLOPs of a result are those of its exit. They leave out that `LiteEncoder`'s last layer
    also runs for the exits before.
    """

    sequential = True

    @configurable
    def __init__(self, threshold: float, exits: Sequence[int]):
        """threshold: an image leaves if its change is below. At 0 all take the last exit, at infinity the first."""
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"MODEL.ECO.CHANGE_THRESHOLD must be a number >= 0, not {threshold}")
        self.threshold = threshold
        self.exits = check_exits(exits)

    @classmethod
    def from_config(cls, cfg, input_shape):
        eco = cfg.MODEL.ECO
        return {"threshold": eco.CHANGE_THRESHOLD, "exits": exits_up_to(eco.EXITS, eco.MAX_EXIT)}

    def leaves(self, exit: int, maps: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        """See `EXIT_POLICY_REGISTRY`."""
        return state_change(maps, before) < self.threshold


def state_change(maps: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """The mean relative change of the tokens of maps [C, h, w] -> [], at least float32."""
    new, old = (torch.cat([m.flatten(1) for m in state], dim=1) for state in (maps, before))  # [C, S]
    dtype = torch.promote_types(new.dtype, torch.float32)
    new, old = new.to(dtype), old.to(dtype)
    smallest = torch.finfo(dtype).tiny
    return ((new - old).norm(dim=0) / old.norm(dim=0).clamp_min(smallest)).mean()
