"""Early exits for any parent: the model trains at several exits of its encoder, and each image leaves at its own.

`EarlyExits` comes before the parent in the bases of a meta-architecture: `EcoMaskFormer(EarlyExits, MaskFormer)`. It
overrides the losses and the choice of the exit, nothing else. With only the last exit and linear weights it equals the
parent bit for bit.

The other images of a batch, and their exits, change neither the exit nor the result of an image. The padded size of the
batch does change them: the backbone's layers carry the padding into the image, as Mask2Former's do. Images of one size
therefore get the same results together as alone. The tools and `load_predictor` run images one by one.
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..exits import ExitSampler, combine_exit_losses, exit_weights
from ..policies.pooling import covered, pool_valid
from ..policies.registry import build_exit_policy
from .sequential_exits import merge_rows, predict_exit_by_exit


class EarlyExits(nn.Module):
    """Adds the method of arXiv 2404.15244, section 3, to a `Parent`."""

    @configurable
    def __init__(
        self, *, exits: Sequence[int], sampler: ExitSampler, exit_policy: nn.Module, recompute: bool = False, **parent
    ):
        """
        Args:
            exits: encoder layers after which an image may leave, ascending.
            sampler: Step A's iteration -> {exit: weight}.
            exit_policy: see `EXIT_POLICY_REGISTRY`.
            recompute: decode exits again in the backward pass; memory then holds the graph of one exit at a time.
            parent: the parent's arguments.
        """
        super().__init__(**parent)
        offered = self.head.exits
        if not set(exits) <= set(offered):
            raise ValueError(f"MODEL.ECO.EXITS {list(exits)} are not all among the encoder's exits {list(offered)}")
        self.exits = tuple(exits)
        self.sampler = sampler
        self.exit_policy = exit_policy
        self.recompute = recompute

    @classmethod
    def from_config(cls, cfg) -> dict:
        parent = super().from_config(cfg)
        eco, head = cfg.MODEL.ECO, parent[cls.head_name]
        weights = exit_weights(eco.ALPHA, eco.EXITS, head.exits[-1])
        return {
            **parent,
            "exits": eco.EXITS,
            "sampler": ExitSampler(eco.EXITS, weights, eco.EXITS_PER_STEP, eco.SEED),
            "exit_policy": build_exit_policy(cfg, policy_shapes(parent["backbone"], head)),
            "recompute": eco.RECOMPUTE,
        }

    def losses(self, features: dict[str, Tensor], targets: list[dict], num_masks: Tensor) -> dict[str, Tensor]:
        """Eq. 3: the parent's loss at each exit that this iteration draws, times alpha."""
        weights = self.sampler(get_event_storage().iter)
        exits = sorted(weights)
        shared, states = self.head.encode(features, exits)

        def exit_losses(shared, *state: Tensor) -> dict[str, Tensor]:
            return self.weighted_losses(self.head.decode(shared, state), targets, num_masks)

        losses = {}
        for k in exits:
            if self.recompute and k != exits[-1]:
                losses[k] = checkpoint(exit_losses, shared, *states[k], use_reentrant=False)
            else:  # the backward pass starts here, and frees this graph before it decodes another exit again
                losses[k] = exit_losses(shared, *states[k])
        return combine_exit_losses(losses, weights, self.exits[-1])

    def inference(self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        """The parent's results, plus `exit` (int) for each image."""
        chosen, pred = self.choose_and_predict(features, images, batched_inputs)
        results = self.postprocess(pred, images, batched_inputs)
        for result, k in zip(results, chosen):
            result["exit"] = k
        return results

    def choose_and_predict(
        self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The exit that the policy chooses for each image, and the prediction of the batch."""
        if getattr(self.exit_policy, "sequential", False):
            shapes = self.backbone.output_shape()
            strides = [shapes[name].stride for name in self.head.encoder_features]
            cells = [[covered(size, s) for s in strides] for size in images.image_sizes]
            return predict_exit_by_exit(self.head, self.exit_policy, features, cells)
        ids = [x.get("image_id") for x in batched_inputs]
        source = getattr(self.exit_policy, "feature_source", "res5")
        exits = self.exit_policy(self.policy_features(features, source), images.image_sizes, image_ids=ids).tolist()
        return exits, self.predict(features, exits)

    def predict(self, features: dict[str, Tensor], exits: list[int]) -> dict[str, Tensor]:
        """The prediction of each image at its own exit. Images run in groups by exit, through no further layer."""
        if len(set(exits)) == 1:
            return self.head(features, exits[0])
        parts = []
        for k in sorted(set(exits)):
            rows = torch.tensor([i for i, e in enumerate(exits) if e == k], device=self.device)
            parts.append((rows, self.head({n: f[rows] for n, f in features.items()}, k)))
        return merge_rows(parts)

    def policy_features(self, features: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The maps that a policy reads: the backbone's, and for "projected" also the coarsest after its projection."""
        return {**features, "projected": self.head.projected(features)} if source == "projected" else features

    def pooled_feature(self, features: dict[str, Tensor], image_sizes, source: str) -> Tensor:
        """The input of a gate that reads `source`: [B, C], see `pool_valid`."""
        stride = policy_shapes(self.backbone, self.head)[source].stride
        return pool_valid(self.policy_features(features, source)[source], image_sizes, stride)


def policy_shapes(backbone: nn.Module, head: nn.Module) -> dict[str, ShapeSpec]:
    """Channels and stride of each map that a policy may read: the backbone's maps and "projected"."""
    maps = backbone.output_shape()
    return {**maps, "projected": ShapeSpec(channels=head.projected_channels, stride=maps[head.coarsest].stride)}
