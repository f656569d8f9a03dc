"""One image in, the model's result out: what `engine.load_predictor` returns."""

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
    "is too large: its masks, at its own size, do not fit into the memory; make it smaller, or cut it into tiles"
)


class Predictor:
    """Calls a model in eval mode with an image.

    Attributes:
        model: the model.
        classes: what its classes are, each a dict with id, name, isthing and color, in the order of the class ids of
            its results; None where neither a dataset nor the checkpoint tells.
    """

    def __init__(self, model: nn.Module, mapper: PanopticTestMapper, precision: Callable[[], AbstractContextManager]):
        """mapper: resizes as at test time; precision: makes the context of the forward pass."""
        self.model = model
        self.mapper = mapper
        self.precision = precision

    @property
    def classes(self) -> Sequence[dict] | None:
        return getattr(self.model, "classes", None)

    def __call__(self, image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> dict:
        """The result for an image (see `data.given_images.rgb_from`), at the image's size as it is seen upright.

        Raises ValueError for what is no image, or is empty, too thin or too large for the model.
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
        """GFLOPs of an image of this size, without running the model.

        Returns:
            {exit: {"total", "backbone", ...}} in the paper's convention, see `costs.ExitCosts.details`; of a DoViT
            {"static": {...}}, where no token stops.

        Raises:
            ValueError: it is no image, or its costs are not known, as for a model that has no exits.
        """
        rgb = rgb_from(image)
        x = {"image": self.mapper.to_tensor(rgb), "height": rgb.shape[0], "width": rgb.shape[1]}
        return self._cost_table.details(*input_sizes(x, self.model.size_divisibility))

    @functools.cached_property
    def _cost_table(self) -> CostTable:
        return cost_table(self.model)

    def _check_memory(self, height: int, width: int) -> None:
        """Raises ValueError where the host's memory cannot hold the masks, for which the system would end the process.

        Counted per pixel, in bytes, are the masks of all queries and the scores of all classes, float32, and what the
        instances take while they are made: see `instance_inference`.
        """
        post = getattr(self.model, "postprocessor", self.model)
        held = 4 * getattr(post, "num_classes", 0) if getattr(post, "semantic_on", True) else 0
        if getattr(post, "semantic_on", False) or getattr(post, "instance_on", False):
            queries = self.model.head.predictor.query_embed.num_embeddings
            held += 4 * queries
            if getattr(post, "instance_on", False):
                classes = post.num_classes if post.thing_classes is None else len(post.thing_classes)
                found = min(post.detections_per_image, queries * classes)
                # binary masks, once as floats; then either two copies more for the scores, or those of the instances
                held += 5 * queries + max(8 * queries, 5 * found)
        needed, free = held * height * width, available_memory()
        if self.model.device.type == "cpu" and free is not None and needed > free:
            raise ValueError(
                f"an image of {width}x{height} pixels {TOO_LARGE} ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free)"
            )


def available_memory() -> int | None:
    """Bytes that this machine can still give, as Linux estimates it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
