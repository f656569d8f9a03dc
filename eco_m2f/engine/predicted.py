"""What Step B hands from the model to a worker process, which loads neither PyTorch nor detectron2 for it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..derived.row import make_row


@dataclass(frozen=True)
class Predicted:
    """A model's predictions for one image at every exit, on the host, and the other values of its derived row."""

    image: dict  # image_id, file_name, height, width
    exits: tuple[int, ...]
    predictions: list  # of each exit, as the quality prepares them
    compare: Callable[[list], list[tuple]]  # with the ground truth, see `quality/registry.py`
    feature: np.ndarray
    total_gflops: list[float]
    encoder_gflops: list[float]

    def row(self) -> dict:
        """The derived row: compares the predictions with the ground truth; see `make_row`."""
        compared = dict(zip(self.exits, self.compare(self.predictions)))
        return make_row(
            **self.image,
            quality=[quality for quality, _ in compared.values()],
            statistics={k: sums for k, (_, sums) in compared.items() if sums is not None},
            feature=self.feature,
            total_gflops=self.total_gflops,
            encoder_gflops=self.encoder_gflops,
        )
