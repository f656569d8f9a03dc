"""The digest by which a gate and a derived dataset identify their parent."""

from collections.abc import Mapping

from torch import Tensor

from .safe_load import weights_sha256


def parent_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """The sha256 of a parent's weights: names, dtypes, shapes and values. Order and file format do not matter.

    Keys of the exit policy ("exit_policy.") are left out, because they are not the parent's.
    """
    return weights_sha256({name: v for name, v in state_dict.items() if not name.startswith("exit_policy.")})
