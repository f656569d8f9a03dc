"""What the tools call: configs, training, evaluation, prediction and Step B.

The names below are for users. They are imported on first use, so `--help` stays fast.
"""

from ..requirements import load_on_first_use

_HOMES = {
    "Trainer": ".train",
    "build_model": ".setup",
    "build_trained": ".predict",
    "load_cfg": ".setup",
    "load_predictor": ".predict",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)
