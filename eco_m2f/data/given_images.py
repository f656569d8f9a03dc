"""Turns what a caller gives into an image: files, PIL images, arrays and tensors, by the rules of images.py."""

import os

import numpy as np
import torch
from PIL import Image

from .images import (
    BRIGHTEN,
    DIM,
    DIM_IMAGE,
    DataError,
    Opened,
    check_pixels,
    from_float,
    open_image,
    remarks,
    to_rgb,
    upright,
    warn_once,
)


def rgb_from(image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    """An image of any of these kinds as uint8 RGB [H, W, 3].

    Files are read like in `read_rgb`. The EXIF orientation of files and PIL images is applied. An array is [H, W],
    [H, W, 1], [H, W, 3] RGB or [H, W, 4] with transparency, which is dropped. A tensor has the channels first. Values
    are uint8, uint16 (the upper 8 bits are used), bool, or float in [0, 1].
    Raises ValueError saying what the image is and what it should be.
    """
    if isinstance(image, (str, os.PathLike)):
        return _warned_of_dim(open_image(os.fspath(image)), os.fspath(image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, torch.Tensor):
        if image.is_meta:
            raise ValueError("expected an image, got a tensor on the meta device, which has no values")
        return _from_array(_channels_last(image.detach().cpu()))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ValueError(
        f"expected an image, got {type(image).__name__}: give a path, a PIL image, a uint8 RGB array [H, W, 3] or a "
        "tensor [3, H, W]"
    )


def _from_pil(image: Image.Image) -> np.ndarray:
    name = getattr(image, "filename", "") or "PIL image"
    try:
        check_pixels(image.height, image.width)
        opened = upright(image)
    except Exception as error:  # Pillow may only now read the file
        raise DataError(f"{name}: image cannot be read ({str(error) or type(error).__name__}); restore it") from error
    return _warned_of_dim(opened, name)


def _warned_of_dim(opened: Opened, name: str) -> np.ndarray:
    """`to_rgb`, with a warning about a dim image. An orientation needs none: there is no annotation."""
    rgb = to_rgb(opened, name)
    if (DIM_IMAGE, BRIGHTEN) in remarks(opened, rgb):
        warn_once(name, DIM_IMAGE, BRIGHTEN)
    return rgb


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"expected a tensor [3, H, W] (or 1 or 4 channels, or [H, W]), got {list(tensor.shape)}: permute its axes"
        )
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.float()
    try:
        return (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, or of a type that numpy lacks
        raise ValueError(
            f"expected a tensor of uint8, uint16, bool, or float in [0, 1], got {tensor.dtype}, {tensor.layout} "
            f"({error}): convert it, e.g. by .to_dense(), .dequantize() or .float()"
        ) from error


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"expected an array [H, W, 3], RGB (or 1 or 4 channels, or [H, W]), got {array.dtype} "
            f"{list(array.shape)}: transpose it, or choose the channels"
        )
    check_pixels(*array.shape[:2])
    planes = array[..., None] if array.ndim == 2 else array
    values, planes = planes, _to_bytes(planes[..., :3])
    if values.dtype.itemsize > 1 and values.max() > 0 and planes.max() < DIM:
        warn_once("image from memory", DIM_IMAGE, BRIGHTEN)
    return np.repeat(planes, 3, axis=2) if planes.shape[2] == 1 else planes


def _to_bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # either byte order
        return (values >> 8).astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "f":
        return from_float(values, "image from memory")
    raise ValueError(
        f"expected an image of uint8, uint16, bool, or float in [0, 1], got {values.dtype}: convert it, e.g. by "
        ".astype('uint8') if the values are 0..255"
    )
