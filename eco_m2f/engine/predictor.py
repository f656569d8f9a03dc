"""The predictor of `engine.load_predictor`: from one image to the model's result."""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..costs import CostTable, cost_table, input_sizes
from ..data.given_images import rgb_from
from ..data.mappers import PanopticTestMapper

TOO_LARGE = (
    "is too large: its masks, at its own size, do not fit into the memory. Make it smaller, or cut it into tiles"
)


class Predictor:
    """Calls a model in eval mode with an image.

    Attributes:
        model: the model.
        classes: a dict with id, name, isthing and color for each class id of the results, in their order; None if
            neither a dataset nor the checkpoint has the classes.
    """

    def __init__(self, model: nn.Module, mapper: PanopticTestMapper, precision: Callable[[], AbstractContextManager]):
        """mapper: resizes as in evaluation. precision: makes the context of the forward pass."""
        self.model = model
        self.mapper = mapper
        self.precision = precision

    @property
    def classes(self) -> Sequence[dict] | None:
        return getattr(self.model, "classes", None)

    def __call__(self, image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> dict:
        """The result for an image (see `data.given_images.rgb_from`), at the size of the upright image.

        Raises ValueError for input that is not an image, or that is empty, too thin or too large for the model.
        """
        rgb = rgb_from(image)
        height, width = rgb.shape[:2]
        self._check_memory(height, width)
        try:
            with torch.no_grad(), self.precision():
                return self.model([{"image": self.mapper.to_tensor(rgb), "height": height, "width": width}])[0]
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
                raise
            raise ValueError(f"an image of {width}x{height} pixels {TOO_LARGE} ({error})") from error

    def costs(self, image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> dict:
        """GFLOPs for an image of this size, without running the model.

        Returns:
            {exit: {"total", "backbone", ...}} in the paper's convention, see `costs.ExitCosts.details`. For a DoViT
            {"static": {...}}, the costs if no token stops.

        Raises:
            ValueError: the input is not an image, or the model's costs are not known, as without exits.
        """
        rgb = rgb_from(image)
        x = {"image": self.mapper.to_tensor(rgb), "height": rgb.shape[0], "width": rgb.shape[1]}
        return self._cost_table.details(*input_sizes(x, self.model.size_divisibility))

    @functools.cached_property
    def _cost_table(self) -> CostTable:
        return cost_table(self.model)

    def _check_memory(self, height: int, width: int) -> None:
        """Raises ValueError if the masks do not fit into the host's memory: the system would kill the process.

        Counts bytes per pixel: the float32 masks of all queries, the float32 scores of all classes, and the tensors of
        `instance_inference`.
        """
        post = getattr(self.model, "postprocessor", self.model)
        held = 4 * getattr(post, "num_classes", 0) if getattr(post, "semantic_on", True) else 0
        if getattr(post, "semantic_on", False) or getattr(post, "instance_on", False):
            queries = self.model.head.predictor.query_embed.num_embeddings
            held += 4 * queries
            if getattr(post, "instance_on", False):
                classes = post.num_classes if post.thing_classes is None else len(post.thing_classes)
                found = min(post.detections_per_image, queries * classes)
                # binary masks and their floats; then two more copies for the scores, or the masks of the instances
                held += 5 * queries + max(8 * queries, 5 * found)
        needed, free = held * height * width, available_memory()
        if self.model.device.type == "cpu" and free is not None and needed > free:
            raise ValueError(
                f"an image of {width}x{height} pixels {TOO_LARGE} ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free)"
            )


def available_memory() -> int | None:
    """Bytes of memory that are available, as Linux estimates them; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
