"""Inference: which exit each image takes. `FixedExit`, `LinearGate` (the paper's), `OracleExit` (the upper bound).

`StateChangeExit`, which decides on the way, is in `state_change_exit.py`.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..exits import FEATURE_SOURCES, check_exits, exit_targets, exits_up_to
from ..gates.gate import Gate

EXIT_POLICY_REGISTRY = Registry("EXIT_POLICY")
EXIT_POLICY_REGISTRY.__doc__ = """
Registry of exit policies: modules that choose an exit for every image, from the backbone's features alone.

A policy is built by `policy_class(cfg, input_shape)`, input_shape being {map name: ShapeSpec} of these features, and
called by `policy(features, image_sizes, image_ids=None)`:

features: {map name: [B, C, h, w]}, the backbone's maps of the padded batch; for FEATURE "projected" also "projected",
    the coarsest map after the head's input projection;
image_sizes: B pairs (height, width) in pixels, before padding;
image_ids: B ids of the images, for policies that look them up; others ignore it.

It returns the exits (layer numbers, all of them in `policy.exits`) as an int64 CPU tensor [B], since the host groups
the images by exit. An image's exit is a function of its own rows of the features and of its size, whatever else is in
the batch. (These rows depend on how far the batch is padded, see `early_exits.py`.) A learned policy also has
`logits(features, image_sizes) -> [B, len(policy.exits)]` and `num_weights`, and raises RuntimeError as long as it has
no weights.
No policy adds anything to the state dict of its parent.

A policy with `sequential` True is not called. It watches the encoder, and is asked after every exit of `policy.exits`
but the last, of each image still under way, by `leaves(exit, maps, before)`:

maps: what the encoder gives at this exit, coarse to fine, [C, h, w] each: the image's own tokens, without padding;
before: the same at the exit before, or for the first exit the encoder's input.

It returns a bool tensor [], True for an image that leaves. Its exits are those of MODEL.ECO.EXITS up to MAX_EXIT.
"""


def check_feature_source(source: str) -> None:
    """Raises ValueError for a MODEL.ECO.FEATURE that there is not."""
    if source not in FEATURE_SOURCES:
        raise ValueError(f"MODEL.ECO.FEATURE must be one of {FEATURE_SOURCES}, not {source!r}")


def build_exit_policy(cfg, input_shape) -> nn.Module:
    """The policy named by cfg.MODEL.ECO.POLICY; `input_shape` is the {map name: ShapeSpec} of what it may read."""
    return EXIT_POLICY_REGISTRY.get(cfg.MODEL.ECO.POLICY)(cfg, input_shape)


@EXIT_POLICY_REGISTRY.register()
class FixedExit(nn.Module):
    """Every image takes the same exit."""

    @configurable
    def __init__(self, exit: int, exits: Sequence[int] | None = None):
        """exits: those the parent offers, if `exit` is to be checked against them."""
        super().__init__()
        if exits is not None and exit not in check_exits(exits):
            raise ValueError(f"MODEL.ECO.EXIT is {exit}, but the parent offers the exits {list(exits)}")
        self.exits = check_exits([exit])

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {"exit": cfg.MODEL.ECO.EXIT, "exits": cfg.MODEL.ECO.EXITS}

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        return torch.full((len(image_sizes),), self.exits[0], dtype=torch.int64)


@EXIT_POLICY_REGISTRY.register()
class LinearGate(nn.Module):
    """The learned policy: exit = argmax (W z + b), z being the mean of an image's valid tokens (Eq. 6).

    Its weights are not part of the parent's checkpoint: `load_gate` brings them in, and may be called again to switch
    to another budget at run time, also while another thread predicts: a call of `forward` uses one gate throughout.
    """

    @configurable
    def __init__(
        self, in_channels: int, stride: int, exits: Sequence[int], feature_source: str = "res5", gate: str = ""
    ):
        """in_channels: C of the map pooled; stride: pixels per token of it; exits: the exits that the parent offers,
        up to K; gate: path of a gate.

        The gate at that path is only examined here (so that a mistake shows at once): it comes into force with
        `load_gate`, when the parent's weights are known.
        """
        super().__init__()
        check_feature_source(feature_source)
        self.in_channels, self.stride = in_channels, stride
        self.offered_exits = check_exits(exits)
        self.feature_source = feature_source
        # Replaced as a whole and never changed: whoever has taken it keeps weights and exits that belong together.
        self._in_force: Gate | None = None
        if gate:
            self._check_fits(Gate.load(gate), gate)

    @classmethod
    def from_config(cls, cfg, input_shape):
        eco = cfg.MODEL.ECO
        check_feature_source(eco.FEATURE)
        if eco.FEATURE not in input_shape:
            raise ValueError(
                f"the gate is to read MODEL.ECO.FEATURE {eco.FEATURE}, but the backbone yields {sorted(input_shape)}: "
                "add it to the backbone's OUT_FEATURES, or let the gate read 'projected'"
            )
        return {
            "in_channels": input_shape[eco.FEATURE].channels,
            "stride": input_shape[eco.FEATURE].stride,
            "exits": exits_up_to(eco.EXITS, eco.MAX_EXIT),
            "feature_source": eco.FEATURE,
            "gate": eco.GATE,
        }

    def load_gate(self, path: str, parent_sha256: str) -> Gate:
        """Puts the gate at `path` into force and returns it.

        parent_sha256: `checkpoint.parent_hash` of the weights that this policy runs beside. Raises ValueError if the
        gate was fitted for other weights, or its exits, features or channels are not those of this parent.
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
        """Puts a gate into force, whatever weights it was fitted for; a copy of it, which nobody else can change."""
        self._in_force = copy.deepcopy(gate)

    @property
    def exits(self) -> tuple[int, ...]:
        """Those of the gate in force; without one, those that the parent offers."""
        gate = self._in_force
        return self.offered_exits if gate is None else gate.exits

    @property
    def num_weights(self) -> int:
        """How many numbers the gate consists of."""
        return (self.in_channels + 1) * len(self.exits)

    def logits(self, features: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """-> [B, len(self.exits)], in float32 at least."""
        return self._logits(self._gate(), features, image_sizes)

    def _gate(self) -> Gate:
        gate = self._in_force
        if gate is None:
            raise RuntimeError("LinearGate has no weights: set MODEL.ECO.GATE, or call load_gate(path, parent_sha256)")
        return gate

    def _logits(self, gate: Gate, features: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        if self.feature_source not in features:
            raise ValueError(f"the gate reads the map {self.feature_source!r}, but the features are {sorted(features)}")
        z = pool_valid(features[self.feature_source], image_sizes, self.stride)  # [B, C]
        with torch.autocast(z.device.type, enabled=False):
            return gate.logits(z)

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        gate = self._gate()
        logits = self._logits(gate, features, image_sizes).cpu()
        if not logits.isfinite().all():
            broken = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise FloatingPointError(f"images {broken} of the batch have non-finite features: check their pixels")
        return torch.tensor(gate.exits)[logits.argmax(dim=1)]

    def _check_fits(self, gate: Gate, path: str) -> None:
        if not set(gate.exits) <= set(self.offered_exits):
            raise ValueError(f"the gate {path} chooses from exits {gate.exits}, the parent offers {self.offered_exits}")
        if gate.feature_source != self.feature_source:
            raise ValueError(
                f"the gate {path} reads {gate.feature_source!r}: set MODEL.ECO.FEATURE so, not {self.feature_source!r}"
            )
        if gate.weight.shape[1] != self.in_channels:
            raise ValueError(f"the gate {path} reads {gate.weight.shape[1]} channels, the map has {self.in_channels}")


@EXIT_POLICY_REGISTRY.register()
class OracleExit(nn.Module):
    """The target exit of Eq. 5, looked up by image id in a derived dataset: what a perfect gate would choose."""

    @configurable
    def __init__(self, derived: str, beta: float, max_exit: int, exits: Sequence[int] | None = None):
        """derived: path of the derived dataset; exits: those the parent offers, if they are to be compared."""
        super().__init__()
        from ..derived.dataset import DerivedDataset  # only this policy needs pyarrow: the others must not wait for it

        if not derived:
            raise ValueError("OracleExit needs MODEL.ECO.DERIVED, the path of a derived dataset")
        dataset = DerivedDataset.load(derived, with_features=False)
        if exits is not None and check_exits(exits) != dataset.exits:
            raise ValueError(f"the derived dataset {derived} has exits {dataset.exits}, the parent offers {exits}")
        targets = exit_targets(dataset.quality, dataset.exits, beta, max_exit)
        self.exits = exits_up_to(dataset.exits, max_exit)
        self.derived = derived
        self.dataset, self.parent_sha256 = (dataset.provenance[key] for key in ("dataset", "parent_sha256"))
        self.exit_of = dict(zip(dataset.image_ids, targets.tolist(), strict=True))

    @classmethod
    def from_config(cls, cfg, input_shape):
        eco = cfg.MODEL.ECO
        return {"derived": eco.DERIVED, "beta": eco.BETA, "max_exit": eco.MAX_EXIT, "exits": eco.EXITS}

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        if image_ids is None or None in image_ids:
            raise ValueError("OracleExit looks images up: every image of the batch needs its image_id")
        unknown = [i for i in image_ids if str(i) not in self.exit_of]
        if unknown:
            raise ValueError(f"images {unknown[:5]} are not in {self.derived}: derive the split they belong to")
        return torch.tensor([self.exit_of[str(i)] for i in image_ids], dtype=torch.int64)


def covered(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(rows, columns) of a map that an image of `size` (height, width) covers, from the top left."""
    return -(-int(size[0]) // stride), -(-int(size[1]) // stride)


def pool_valid(feature_map: Tensor, image_sizes: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """The mean over the tokens that an image covers, its padding left out: [B, C, h, w] -> [B, C].

    image_sizes: B pairs (height, width) in pixels before padding; an image covers ceil(height / stride) rows and
    ceil(width / stride) columns from the top left. Computed in float32 at least. Raises ValueError for an image that
    is empty or larger than its map.
    """
    if len(image_sizes) != len(feature_map):
        raise ValueError(f"{len(image_sizes)} image sizes for a batch of {len(feature_map)}")
    dtype = torch.promote_types(feature_map.dtype, torch.float32)
    pooled = []
    for tokens, (height, width) in zip(feature_map, image_sizes):  # tokens: [C, h, w]
        rows, columns = covered((height, width), stride)
        if not (1 <= rows <= tokens.shape[1] and 1 <= columns <= tokens.shape[2]):
            raise ValueError(f"an image of {height} x {width} does not fit the map {list(tokens.shape)} at 1/{stride}")
        # flattened to one contiguous axis, so that the sum runs in the same order whatever the padding
        pooled.append(tokens[:, :rows, :columns].to(dtype).flatten(1).contiguous().mean(dim=1))
    return torch.stack(pooled) if pooled else feature_map.new_zeros((0, feature_map.shape[1]), dtype=dtype)
