"""A fixed depth for all images."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..exits import check_exits
from .registry import EXIT_POLICY_REGISTRY


@EXIT_POLICY_REGISTRY.register()
class FixedExit(nn.Module):
    """All images take the same exit."""

    @configurable
    def __init__(self, exit: int, exits: Sequence[int] | None = None):
        """exits: the parent's exits, to check `exit`; None: no check."""
        super().__init__()
        if exits is not None and exit not in check_exits(exits):
            raise ValueError(f"MODEL.ECO.EXIT is {exit}, but the parent offers the exits {list(exits)}")
        self.exits = check_exits([exit])

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {"exit": cfg.MODEL.ECO.EXIT, "exits": cfg.MODEL.ECO.EXITS}

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        return torch.full((len(image_sizes),), self.exits[0], dtype=torch.int64)
