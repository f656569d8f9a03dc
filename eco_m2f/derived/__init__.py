"""The derived dataset of Step B: the quality and cost of every image at every exit. It knows no models.

The names below are loaded when first asked for: a worker process makes rows, and needs nothing else.
"""

from ..requirements import load_on_first_use

_HOMES = {
    "DerivedDataset": ".dataset",
    "DerivedDatasetError": ".schema",
    "MANIFEST": ".schema",
    "PROVENANCE_KEYS": ".schema",
    "ShardWriter": ".writer",
    "make_row": ".row",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)
