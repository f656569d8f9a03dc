"""The digest by which a gate and a derived dataset know their parent."""

from collections.abc import Mapping

from torch import Tensor

from .safe_load import weights_sha256


def parent_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """The sha256 of weights: of names, dtypes, shapes and values, whatever the order and the file around them.

    Keys of the exit policy ("exit_policy.") do not count: they are not the parent's.
    """
    return weights_sha256({name: v for name, v in state_dict.items() if not name.startswith("exit_policy.")})
