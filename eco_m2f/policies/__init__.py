"""Exit policies, one file each: which exit each image takes. Importing this package registers all of them."""

from .fixed import FixedExit
from .linear_gate import LinearGate
from .oracle import OracleExit
from .registry import EXIT_POLICY_REGISTRY, build_exit_policy, check_feature_source
from .state_change import StateChangeExit

__all__ = [
    "EXIT_POLICY_REGISTRY",
    "FixedExit",
    "LinearGate",
    "OracleExit",
    "StateChangeExit",
    "build_exit_policy",
    "check_feature_source",
]
