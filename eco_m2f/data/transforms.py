"""Augmentations that detectron2 lacks: SSD's colour distortion, and resizing that is safe for thin images."""

import numpy as np
from detectron2.data import transforms as T

from ..requirements import require

HUE_PERIOD = 180  # OpenCV stores the hue of a uint8 image in steps of two degrees


class ShortestEdge(T.ResizeShortestEdge):
    """detectron2's ResizeShortestEdge, but a very long and thin image keeps at least one pixel per side."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ColorDistortion(T.Transform):
    """A fixed change of brightness, contrast, saturation and hue of a uint8 image. Geometry does not change.

    First (image + brightness) * contrast, then saturation (a factor) and hue (a shift in steps of 2 degrees) in HSV
    space. With contrast_last the contrast factor comes last. Values are rounded and clipped after each step.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: int = 0,
        contrast_last: bool = False,
        image_format: str = "RGB",
    ):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR for the colour distortion, got {image_format!r}")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        img = _linear(img, 1.0, self.brightness)
        if not self.contrast_last:
            img = _linear(img, self.contrast, 0.0)
        if self.saturation != 1.0 or self.hue != 0:
            img = self._shift_hsv(img)
        if self.contrast_last:
            img = _linear(img, self.contrast, 0.0)
        return img

    def _shift_hsv(self, img: np.ndarray) -> np.ndarray:
        cv2 = require("cv2", "INPUT.COLOR_AUG_SSD")
        hsv = cv2.cvtColor(np.ascontiguousarray(img), getattr(cv2, f"COLOR_{self.image_format}2HSV"))
        hsv[..., 1] = _linear(hsv[..., 1], self.saturation, 0.0)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + self.hue) % HUE_PERIOD
        return cv2.cvtColor(hsv, getattr(cv2, f"COLOR_HSV2{self.image_format}"))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class ColorAugSSD(T.Augmentation):
    """Draws a ColorDistortion as in SSD's training: each of the four changes has probability one half.

    Brightness lies within +-32 grey levels, contrast and saturation factors in 0.5..1.5, hue within +-18 of 180 steps.
    The contrast comes first or last with equal probability (Liu et al., SSD, 2016, section 2.2 and released settings).
    """

    def __init__(self, image_format: str):
        super().__init__()
        require("cv2", "INPUT.COLOR_AUG_SSD")  # so that it fails before the first image, not in a worker
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> ColorDistortion:
        coin = np.random.rand(5) < 0.5
        return ColorDistortion(
            brightness=np.random.uniform(-32, 32) if coin[0] else 0.0,
            contrast=np.random.uniform(0.5, 1.5) if coin[1] else 1.0,
            saturation=np.random.uniform(0.5, 1.5) if coin[2] else 1.0,
            hue=int(np.random.randint(-18, 19)) if coin[3] else 0,
            contrast_last=bool(coin[4]),
            image_format=self.image_format,
        )


class JitterScale(T.ResizeScale):
    """detectron2's ResizeScale, but a very thin image keeps at least one pixel per side."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        return T.ResizeTransform(resize.h, resize.w, max(resize.new_h, 1), max(resize.new_w, 1), resize.interp)


def _linear(img: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """clip(img * factor + offset) in uint8, by a table of the 256 grey levels."""
    if factor == 1.0 and offset == 0.0:
        return img
    table = np.clip(np.rint(np.arange(256) * factor + offset), 0, 255).astype(np.uint8)
    return table[img]
