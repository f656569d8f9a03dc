"""Renames the parameters of older checkpoints to their current names."""

from collections.abc import Mapping
from typing import TypeVar

from .errors import CheckpointError

HEAD = "sem_seg_head."

T = TypeVar("T")  # a tensor, an array or a shape


def upgrade_keys(state_dict: Mapping[str, T]) -> dict[str, T]:
    """A state dict under Mask2Former's current names, from any style in which it was published.

    It removes `module.` of a distributed run. Under `sem_seg_head.`, names outside `pixel_decoder.` and `predictor.`
    move into `pixel_decoder.`. `static_query` becomes `query_feat`. Only the names decide, not a version number, so
    current names do not change. The argument does not change; a state dict's `_metadata` is dropped.

    Raises:
        CheckpointError: two keys get the same name.
    """
    distributed = bool(state_dict) and all(key.startswith("module.") for key in state_dict)
    upgraded: dict[str, T] = {}
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        new = _current_name(key.removeprefix("module.") if distributed else key)
        if new in upgraded:
            raise CheckpointError(f"the checkpoint holds {new!r} twice, as {origin[new]!r} and as {key!r}")
        upgraded[new], origin[new] = value, key
    return upgraded


def _current_name(key: str) -> str:
    if not key.startswith(HEAD):
        return key
    rest = key.removeprefix(HEAD)
    if not rest.startswith(("pixel_decoder.", "predictor.")):
        rest = "pixel_decoder." + rest
    return HEAD + rest.replace("predictor.static_query.", "predictor.query_feat.")
