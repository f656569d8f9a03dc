"""The registry of exit policies. Its docstring is their contract."""

from detectron2.utils.registry import Registry
from torch import nn

from ..exits import FEATURE_SOURCES

EXIT_POLICY_REGISTRY = Registry("EXIT_POLICY")
EXIT_POLICY_REGISTRY.__doc__ = """
Exit policies: modules that choose an exit for each image, from the backbone's features.

A policy is built as `policy_class(cfg, input_shape)`, where input_shape is the {map name: ShapeSpec} of these features.
It is called as `policy(features, image_sizes, image_ids=None)`:

features: {map name: [B, C, h, w]}, the backbone's maps of the padded batch. With FEATURE "projected" they also hold
    "projected", the coarsest map after the head's input projection;
image_sizes: B pairs (height, width) in pixels, before padding;
image_ids: B ids of the images. Only policies that look up images read them.

It returns the exits (layer numbers in `policy.exits`) as an int64 tensor [B] on the CPU, where images are grouped by
exit. The exit of an image depends only on its size and its own rows of the features. (These rows depend on the padded
size of the batch, see `early_exits.py`.) A learned policy also has `logits(features, image_sizes) ->
[B, len(policy.exits)]` and `num_weights`. It raises RuntimeError while it has no weights. No policy adds to the state
dict of its parent.

Two hooks are optional. Both get the digest of the parent's weights (`checkpoint.parent_hash`), and raise ValueError:
`prepare(parent_sha256)` runs after the parent's weights are loaded, before the first image. A learned policy loads its
    weights here, which were fitted for that parent.
`check_dataset(dataset_name, parent_sha256)` runs before a dataset is evaluated. A policy that knows only certain images
    refuses others here.

A policy with `sequential` True is not called. Instead `leaves(exit, maps, before)` is called for each running image,
after each exit of `policy.exits` but the last:

maps: the encoder's result at this exit, coarse to fine, [C, h, w] each: the image's own tokens, without padding;
before: the same at the exit before; for the first exit, the encoder's input.

It returns a bool tensor [], True if the image leaves. Its exits are those of MODEL.ECO.EXITS up to MAX_EXIT.
"""


def check_feature_source(source: str) -> None:
    """Raises ValueError unless `source` is one of `FEATURE_SOURCES`."""
    if source not in FEATURE_SOURCES:
        raise ValueError(f"MODEL.ECO.FEATURE must be one of {FEATURE_SOURCES}, not {source!r}")


def build_exit_policy(cfg, input_shape) -> nn.Module:
    """Builds the policy MODEL.ECO.POLICY; `input_shape` is the {map name: ShapeSpec} of the maps that it may read."""
    return EXIT_POLICY_REGISTRY.get(cfg.MODEL.ECO.POLICY)(cfg, input_shape)
