"""The registry of exit policies, whose docstring is their contract."""

from detectron2.utils.registry import Registry
from torch import nn

from ..exits import FEATURE_SOURCES

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

Two hooks are optional. Both get the digest of the parent's weights (`checkpoint.parent_hash`), and raise ValueError:
`prepare(parent_sha256)` is called once the parent's weights are loaded, before the first image. A learned policy loads
    here what was fitted for these weights.
`check_dataset(dataset_name, parent_sha256)` is called before a dataset is evaluated. A policy that knows certain images
    refuses others here.

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
