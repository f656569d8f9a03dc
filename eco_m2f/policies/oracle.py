"""The upper bound: each image takes its exit target (Eq. 5)."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor, nn

from ..exits import check_exits, exit_targets, exits_up_to
from .registry import EXIT_POLICY_REGISTRY


@EXIT_POLICY_REGISTRY.register()
class OracleExit(nn.Module):
    """Looks up each image's exit target (Eq. 5) in a derived dataset, as a perfect gate would choose."""

    @configurable
    def __init__(self, derived: str, beta: float, max_exit: int, exits: Sequence[int] | None = None):
        """derived: path of the derived dataset; exits: the parent's exits, to compare; None: no comparison."""
        super().__init__()
        from ..derived.dataset import DerivedDataset  # imports pyarrow, which only this policy needs

        if not derived:
            raise ValueError("OracleExit needs MODEL.ECO.DERIVED, the path of a derived dataset")
        dataset = DerivedDataset.load(derived, with_features=False)
        if exits is not None and check_exits(exits) != dataset.exits:
            raise ValueError(f"the derived dataset {derived} has exits {dataset.exits}, the parent offers {exits}")
        if dataset.view != "plain":
            raise ValueError(f"the derived dataset {derived} is of the view {dataset.view}: derive it without --view")
        targets = exit_targets(dataset.quality, dataset.exits, beta, max_exit)
        self.exits = exits_up_to(dataset.exits, max_exit)
        self.derived = derived
        self.dataset, self.parent_sha256 = (dataset.provenance[key] for key in ("dataset", "parent_sha256"))
        self.exit_of = dict(zip(dataset.image_ids, targets.tolist(), strict=True))

    @classmethod
    def from_config(cls, cfg, input_shape):
        eco = cfg.MODEL.ECO
        return {"derived": eco.DERIVED, "beta": eco.BETA, "max_exit": eco.MAX_EXIT, "exits": eco.EXITS}

    def check_dataset(self, dataset_name: str, parent_sha256: str) -> None:
        """See `EXIT_POLICY_REGISTRY`."""
        if _annotation(self.dataset) != _annotation(dataset_name):
            raise ValueError(
                f"MODEL.ECO.DERIVED {self.derived} is of {self.dataset!r}, but {dataset_name!r} is evaluated: derive it"
            )
        if self.parent_sha256 != parent_sha256:
            raise ValueError(
                f"MODEL.ECO.DERIVED {self.derived} was made with other weights: load those, or derive it again"
            )

    def forward(self, features: Mapping[str, Tensor], image_sizes, image_ids=None) -> Tensor:
        if image_ids is None or None in image_ids:
            raise ValueError("OracleExit looks up images: each image of the batch needs its image_id")
        unknown = [i for i in image_ids if str(i) not in self.exit_of]
        if unknown:
            raise ValueError(f"images {unknown[:5]} are not in {self.derived}: derive their split")
        return torch.tensor([self.exit_of[str(i)] for i in image_ids], dtype=torch.int64)


def _annotation(dataset_name: str) -> str:
    """A dataset's annotation file, else its name. A split may have two names, with and without class maps."""
    metadata = MetadataCatalog.get(dataset_name) if dataset_name in DatasetCatalog.list() else None
    files = (getattr(metadata, key, None) for key in ("panoptic_json", "json_file"))
    return next((file for file in files if file), dataset_name)
