"""The paper's policy: a linear gate on pooled features (Eq. 6)."""

import copy
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..exits import check_exits, exits_up_to
from ..gates.gate import Gate
from .pooling import pool_valid
from .registry import EXIT_POLICY_REGISTRY, check_feature_source


@EXIT_POLICY_REGISTRY.register()
class LinearGate(nn.Module):
    """The learned policy: exit = argmax (W z + b), where z is the mean of an image's own tokens (Eq. 6).

    The weights are in a gate's file, not in the parent's checkpoint. `prepare` loads MODEL.ECO.GATE. `load_gate`
    switches to another budget at run time, also while other threads predict: each call of `forward` uses one gate.
    """

    @configurable
    def __init__(
        self, in_channels: int, stride: int, exits: Sequence[int], feature_source: str = "res5", gate: str = ""
    ):
        """
        Args:
            in_channels: C of the pooled map; stride: pixels per token of that map.
            exits: the parent's exits, up to K.
            gate: path of a gate. It is only checked here, to show mistakes early. `prepare` puts it into use, when the
                parent's weights are known.
        """
        super().__init__()
        check_feature_source(feature_source)
        self.in_channels, self.stride = in_channels, stride
        self.offered_exits = check_exits(exits)
        self.feature_source = feature_source
        # Replaced as a whole and never changed: a running call keeps weights and exits that belong together.
        self._current: Gate | None = None
        self.gate = gate
        if gate:
            self._check_fits(Gate.load(gate), gate)

    @classmethod
    def from_config(cls, cfg, input_shape):
        eco = cfg.MODEL.ECO
        check_feature_source(eco.FEATURE)
        if eco.FEATURE not in input_shape:
            raise ValueError(
                f"the gate reads MODEL.ECO.FEATURE {eco.FEATURE}, but the backbone yields {sorted(input_shape)}: "
                "add it to the backbone's OUT_FEATURES, or set MODEL.ECO.FEATURE to 'projected'"
            )
        return {
            "in_channels": input_shape[eco.FEATURE].channels,
            "stride": input_shape[eco.FEATURE].stride,
            "exits": exits_up_to(eco.EXITS, eco.MAX_EXIT),
            "feature_source": eco.FEATURE,
            "gate": eco.GATE,
        }

    def prepare(self, parent_sha256: str) -> None:
        """See `EXIT_POLICY_REGISTRY`."""
        self.load_gate(self.gate, parent_sha256)

    def load_gate(self, path: str, parent_sha256: str) -> Gate:
        """Puts the gate at `path` into use and returns it.

        parent_sha256: `checkpoint.parent_hash` of the parent's weights. Raises ValueError if the gate was fitted for
        other weights, or does not fit the parent's exits, features or channels.
        """
        gate = Gate.load(path)
        self._check_fits(gate, path)
        if gate.parent_sha256 != parent_sha256:
            raise ValueError(
                f"the gate {path} was fitted for parent weights {gate.parent_sha256[:12]}..., but runs beside "
                f"{parent_sha256[:12]}...: load that parent, or run steps B and C again for this one"
            )
        self.use(gate)
        return gate

    def use(self, gate: Gate) -> None:
        """Puts a copy of a gate into use, without a check of the weights that it was fitted for."""
        self._current = copy.deepcopy(gate)

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits of the gate in use; without a gate, the parent's."""
        gate = self._current
        return self.offered_exits if gate is None else gate.exits

    @property
    def num_weights(self) -> int:
        """The number of weights in the gate."""
        return (self.in_channels + 1) * len(self.exits)

    def logits(self, features: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """The gate's logits, [B, len(self.exits)], at least float32."""
        return self._logits(self._gate(), features, image_sizes)

    def _gate(self) -> Gate:
        gate = self._current
        if gate is None:
            raise RuntimeError("LinearGate has no weights: set MODEL.ECO.GATE, or call load_gate(path, parent_sha256)")
        return gate

    def _logits(self, gate: Gate, features: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        if self.feature_source not in features:
            raise ValueError(f"the gate reads the map {self.feature_source!r}, but the features are {sorted(features)}")
        z = pool_valid(features[self.feature_source], image_sizes, self.stride)  # [B, C]
        with torch.autocast(z.device.type, enabled=False):
            return gate.logits(z)  # [B, E]

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        gate = self._gate()
        logits = self._logits(gate, features, image_sizes).cpu()
        if not logits.isfinite().all():
            broken = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise FloatingPointError(f"images {broken} of the batch have non-finite features: check their pixels")
        return gate.exits_of(logits)

    def _check_fits(self, gate: Gate, path: str) -> None:
        if not set(gate.exits) <= set(self.offered_exits):
            raise ValueError(f"the gate {path} chooses from exits {gate.exits}, the parent offers {self.offered_exits}")
        if gate.feature_source != self.feature_source:
            raise ValueError(
                f"the gate {path} reads {gate.feature_source!r}: set MODEL.ECO.FEATURE so, not {self.feature_source!r}"
            )
        if gate.weight.shape[1] != self.in_channels:
            raise ValueError(f"the gate {path} reads {gate.weight.shape[1]} channels, the map has {self.in_channels}")
