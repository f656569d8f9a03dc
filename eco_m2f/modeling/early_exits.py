"""Early exits for any parent: trained at several exits of its encoder, it lets each image leave at its own.

`EarlyExits` stands before the parent among the bases of a meta-architecture: `EcoMaskFormer(EarlyExits, MaskFormer)`.
Against the parent it overrides how losses are taken and how the exit is chosen, nothing else; with the last exit alone
and linear weights it is bit-equal to the parent.

What an image of a batch gets: its exit and its result do not depend on what the other images show, nor on where they
leave. They do depend on the size that the batch is padded to, for a backbone's layers carry what they make of the
padding into the image, as Mask2Former's do. So an image gets what it would get alone where the batch has the size that
it would be padded to alone: images of one size. Tools and `load_predictor` take images one by one.
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
    """What arXiv 2404.15244, section 3, adds to a `Parent`."""

    @configurable
    def __init__(
        self, *, exits: Sequence[int], sampler: ExitSampler, exit_policy: nn.Module, recompute: bool = False, **parent
    ):
        """
        Args:
            exits: encoder layers after which an image may leave, ascending.
            sampler: Step A's iteration -> {exit: weight}.
            exit_policy: see `EXIT_POLICY_REGISTRY`.
            recompute: decode exits again in the backward pass, so that the graph of one exit at a time is in memory.
            parent: the arguments of the parent.
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
        """Eq. 3: the parent's whole loss at each exit drawn for this iteration, weighted by alpha."""
        weights = self.sampler(get_event_storage().iter)
        exits = sorted(weights)
        shared, states = self.head.encode(features, exits)

        def exit_losses(shared, *state: Tensor) -> dict[str, Tensor]:
            return self.weighted_losses(self.head.decode(shared, state), targets, num_masks)

        losses = {}
        for k in exits:
            if self.recompute and k != exits[-1]:
                losses[k] = checkpoint(exit_losses, shared, *states[k], use_reentrant=False)
            else:  # the backward pass comes to it first and frees it before any other is decoded again
                losses[k] = exit_losses(shared, *states[k])
        return combine_exit_losses(losses, weights, self.exits[-1])

    def inference(self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        """As the parent, plus `exit` (int) of every image."""
        chosen, pred = self.choose_and_predict(features, images, batched_inputs)
        results = self.postprocess(pred, images, batched_inputs)
        for result, k in zip(results, chosen):
            result["exit"] = k
        return results

    def choose_and_predict(
        self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The exit of every image, by the policy, and the prediction of the batch."""
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
        """Each image at its own exit, as if alone with these features.

        Images are grouped by exit, and no image runs a layer that it does not need.
        """
        if len(set(exits)) == 1:
            return self.head(features, exits[0])
        parts = []
        for k in sorted(set(exits)):
            rows = torch.tensor([i for i, e in enumerate(exits) if e == k], device=self.device)
            parts.append((rows, self.head({n: f[rows] for n, f in features.items()}, k)))
        return merge_rows(parts)

    def policy_features(self, features: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """What a policy reads: the backbone's maps, and for "projected" also the coarsest after the projection."""
        return {**features, "projected": self.head.projected(features)} if source == "projected" else features

    def pooled_feature(self, features: dict[str, Tensor], image_sizes, source: str) -> Tensor:
        """What a gate that reads `source` sees of every image: [B, C], see `pool_valid`."""
        stride = policy_shapes(self.backbone, self.head)[source].stride
        return pool_valid(self.policy_features(features, source)[source], image_sizes, stride)


def policy_shapes(backbone: nn.Module, head: nn.Module) -> dict[str, ShapeSpec]:
    """Channels and stride of every map that a policy may read: the backbone's, and "projected" where there is one."""
    maps = backbone.output_shape()
    return {**maps, "projected": ShapeSpec(channels=head.projected_channels, stride=maps[head.coarsest].stride)}
