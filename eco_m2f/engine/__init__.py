"""What the tools call: configs, training, evaluation, prediction and Step B.

The names below are for users. They are imported on first use, so `--help` stays fast.
"""

import importlib

_HOMES = {
    "Trainer": ".train",
    "build_model": ".setup",
    "build_trained": ".predict",
    "load_cfg": ".setup",
    "load_predictor": ".predict",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
