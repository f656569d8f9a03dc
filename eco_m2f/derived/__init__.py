"""The derived dataset of Step B: the quality and cost of every image at every exit. It knows no models.

The names below are loaded when first asked for: a worker process makes rows, and needs nothing else.
"""

import importlib

_HOMES = {
    "DerivedDataset": ".dataset",
    "DerivedDatasetError": ".schema",
    "MANIFEST": ".schema",
    "PROVENANCE_KEYS": ".schema",
    "ShardWriter": ".writer",
    "make_row": ".row",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
