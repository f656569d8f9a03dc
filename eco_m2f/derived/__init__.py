"""The derived dataset of Step B: the quality and cost of every image at every exit. It knows no models."""

from .dataset import DerivedDataset
from .schema import MANIFEST, PROVENANCE_KEYS, DerivedDatasetError
from .writer import ShardWriter, make_row

__all__ = ["MANIFEST", "PROVENANCE_KEYS", "DerivedDataset", "DerivedDatasetError", "ShardWriter", "make_row"]
