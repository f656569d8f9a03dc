"""PRO-SCALE's encoder: levels join one by one, so early layers see few tokens (arXiv 2404.14657).

The exits are this project's own. Parameters have the parent's names. A layer with fewer levels predicts fewer offsets
and weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from .msdeform import MSDeformEncoder, TokenState, split_levels
from .registry import TRANSFORMER_ENCODER_REGISTRY


@dataclass(frozen=True)
class StageState(TokenState):
    """`tokens` belong to the levels that have joined."""

    projected: Tensor  # [B, S, C] of all levels


@TRANSFORMER_ENCODER_REGISTRY.register()
class ProScaleEncoder(MSDeformEncoder):
    """Stage i runs its layers on the i coarsest levels. A level that joins enters as its input projection.

    The exits are the layers of the last stage and, as an option, the end of each stage. There, the levels that have not
    joined are returned as their projections.
    """

    @configurable
    def __init__(
        self, *, stages: Sequence[int], temperature: float | None = 0.1, exit_after_stages: bool = False, **encoder
    ):
        """
        Args:
            stages: layers per stage, with one stage per level; the last stage has at least one.
            temperature: of token recalibration. The tokens of a joining level are multiplied by
                sigmoid(temperature * score); the finest level gives the score, and is itself not recalibrated. None:
                no recalibration.
            encoder: the other arguments of `MSDeformEncoder`.
        """
        if min(stages) < 0 or stages[-1] < 1:
            raise ValueError(
                f"MODEL.PROSCALE.STAGES {list(stages)}: each stage needs at least 0 layers, the last at least 1"
            )
        layer_levels = [level for level, layers in enumerate(stages, start=1) for _ in range(layers)]
        super().__init__(num_layers=sum(stages), num_levels=len(stages), layer_levels=layer_levels, **encoder)
        self.layer_levels = layer_levels
        self.exits = self.exits[-stages[-1] :]
        if exit_after_stages:
            self.exits = tuple(sorted({*self.exits, *accumulate(stages)} - {0}))
        self.temperature = temperature
        if temperature is not None:
            self.recalibration = nn.Linear(self.dim, 1)

    @classmethod
    def from_config(cls, cfg) -> dict:
        own, parent = cfg.MODEL.PROSCALE, MSDeformEncoder.from_config(cfg)
        levels, layers = parent.pop("num_levels"), parent.pop("num_layers")
        if len(own.STAGES) != levels:
            raise ValueError(
                f"MODEL.PROSCALE.STAGES {own.STAGES} must be {levels} numbers, one per level of the encoder"
            )
        if sum(own.STAGES) != layers:
            raise ValueError(
                f"MODEL.PROSCALE.STAGES {own.STAGES} are {sum(own.STAGES)} layers, but TRANSFORMER_ENC_LAYERS is "
                f"{layers}: set it to {sum(own.STAGES)}"
            )
        return {
            **parent,
            "stages": own.STAGES,
            "temperature": own.TEMPERATURE if own.RECALIBRATE else None,
            "exit_after_stages": own.EXIT_AFTER_STAGES,
        }

    def start(self, maps: Sequence[Tensor], pos: Sequence[Tensor]) -> StageState:
        state = super().start(maps, pos)
        return StageState(0, state.tokens[:, :0], state.pos, state.reference, state.shapes, projected=state.tokens)

    def step(self, state: StageState, exit: int) -> tuple[StageState, list[Tensor]]:
        tokens, shapes = state.tokens, state.shapes
        for layer, levels in zip(self.encoder.layers[state.exit : exit], self.layer_levels[state.exit : exit]):
            tokens = self.with_levels(tokens, state, levels)
            end = tokens.shape[1]
            tokens = layer(tokens, state.pos[:, :end], state.reference[:, :end], shapes[:levels])
        maps = split_levels(torch.cat((tokens, state.projected[:, tokens.shape[1] :]), dim=1), shapes)
        return replace(state, exit=exit, tokens=tokens), maps

    def with_levels(self, tokens: Tensor, state: StageState, levels: int) -> Tensor:
        """tokens [B, S, C] of the coarsest levels -> the tokens of this many levels."""
        ends = list(accumulate((h * w for h, w in state.shapes), initial=0))
        joined = ends.index(tokens.shape[1])  # how many levels have joined
        if joined == levels:
            return tokens
        projected = split_levels(state.projected, state.shapes)
        return torch.cat([tokens, *(self.joining(projected, i) for i in range(joined, levels))], dim=1)

    def joining(self, projected: Sequence[Tensor], level: int) -> Tensor:
        """The tokens [B, h * w, C] that a joining level brings; projected: the maps [B, C, h, w] of all levels."""
        tokens = projected[level].flatten(2).transpose(1, 2)  # [B, h * w, C]
        if self.temperature is None or level == len(projected) - 1:
            return tokens
        finest = F.interpolate(projected[-1], size=projected[level].shape[-2:], mode="bilinear", align_corners=False)
        score = self.recalibration(finest.flatten(2).transpose(1, 2))  # [B, h * w, 1]
        return tokens * torch.sigmoid(self.temperature * score)
