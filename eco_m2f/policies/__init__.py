"""Exit policies, one file each. They choose the exit of each image. Importing this package registers them."""

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
