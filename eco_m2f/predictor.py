"""One image in, the model's result out: what `engine.load_predictor` returns."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image
from torch import nn

from .data import PanopticTestMapper
from .data.images import rgb_from


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
        """The result for an image (see `data.images.rgb_from`), at the image's size as it is seen upright.

        Raises ValueError for what is no image, or is empty, too thin or too large for the model.
        """
        rgb = rgb_from(image)
        height, width = rgb.shape[:2]
        with torch.no_grad(), self.precision():
            return self.model([{"image": self.mapper.to_tensor(rgb), "height": height, "width": width}])[0]
