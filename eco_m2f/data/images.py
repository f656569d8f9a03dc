"""Images: one way to open a file, and one rule for each kind of pixel. datasets/README.md states the rules for users.

A file is opened as one of few formats, so that no other reader (EPS starts Ghostscript) ever sees it. The size that its
header declares is checked before anything is decoded. The EXIF orientation is applied, as detectron2 does: the
annotation of a photo belongs to the image as a viewer shows it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import open_regular

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
MAX_PIXELS = 178_956_970  # of a file or an array; twice what Pillow warns of, and where Pillow itself stops
EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")  # Pillow's modes
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # EXIF's tag
BITS, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # TIFF's tags and their values
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
DIM = 16  # of 256 levels: an image of 12 bits in 16 has no more
DIM_IMAGE = f"image of more than 8 bits that uses fewer than {DIM} of the 256 levels the model sees"
BRIGHTEN = "multiply the values of all images by one number, so that they fill the range, or save them as 8 bits"
ADVICE = "run tools/check_dataset.py on the dataset to list every such file"

logger = logging.getLogger(__name__)
_warned: set[str] = set()


class DataError(ValueError):
    """A file of a dataset is missing, unreadable or contradicts another; the message names it and the remedy."""


@dataclass(frozen=True)
class Opened:
    """A decoded file, turned upright.

    raw: Pillow's name for how the file stores pixels, such as "RGB;16B"; format: such as "PNG"; orientation: that of
    the EXIF data, 1 to 8, which has been applied.
    """

    image: Image.Image
    raw: str
    format: str
    orientation: int

    @property
    def sixteen_bits(self) -> bool:
        """Whether the file has 16 bits per channel."""
        kind, _, bits = self.raw.partition(";")
        stored = bits.startswith("16") and kind != "BGR"  # where it is the 16 bits of all three channels
        return stored or self.image.mode in SIXTEEN_BITS or (self.format == "PPM" and self.image.mode == "I")

    @property
    def turned(self) -> bool:
        """Whether the EXIF data turned or mirrored it and its size does not tell."""
        return self.orientation in (2, 3, 4) or (self.orientation > 4 and self.image.width == self.image.height)


def open_image(file_name: str | Path, kind: str = "image", formats: tuple[str, ...] = FORMATS) -> Opened:
    """Decodes a file as one of `formats`. kind: what messages call it.

    Raises DataError if it is missing, no regular file, damaged, of another format, of several pages, or declares more
    than MAX_PIXELS.
    """
    try:
        with open_regular(file_name) as file:
            return _decode(file, formats)
    except FileNotFoundError as error:
        raise DataError(
            f"{file_name}: {kind} not found; restore it or drop it from the annotations (datasets/README.md shows "
            f"where each dataset's files belong); {ADVICE}"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{file_name}: {kind} cannot be read (none of {', '.join(formats)}, or damaged); restore it or convert it "
            f"to PNG; {ADVICE}"
        ) from error
    except Exception as error:  # Pillow's readers let through whatever a damaged file leads them to
        reason = str(error) or type(error).__name__
        raise DataError(f"{file_name}: {kind} cannot be read ({reason}); restore it or drop it; {ADVICE}") from error


def _decode(file: BinaryIO, formats: tuple[str, ...]) -> Opened:
    image = _checked(Image.open(file, formats=formats))
    if image.format == "PNG":  # the one format whose parts have checksums; Pillow ignores those of the pixels
        image.verify()
        file.seek(0)
        image = Image.open(file, formats=formats)
    return upright(image)


def upright(image: Image.Image) -> Opened:
    """Decodes an image and turns it upright. Raises what Pillow does for damage."""
    raw, kind = _raw_mode(image), image.format or ""
    if kind == "PNG":  # to look for its EXIF data loads it too, and would hide that this fails
        image.load()
    orientation = _orientation(image)  # before the loading, for Pillow then turns a TIFF by itself
    image.load()
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    return Opened(upright, raw, kind, orientation)


def _checked(image: Image.Image) -> Image.Image:
    """The image, its pixels not decoded yet. Raises ValueError for too many pixels, or several pages."""
    check_pixels(image.height, image.width)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG holds previews beside it
        raise ValueError("it holds several pages or frames: save each as a file of its own")
    if image.format == "TIFF":
        _check_samples(image)
    return image


def _check_samples(image: Image.Image) -> None:
    """Raises ValueError for a TIFF whose numbers Pillow hands out without what the file says they mean."""
    tags = image.tag_v2
    few_bits = max(np.atleast_1d(tags.get(BITS, 1))) <= 16  # for more there is no rule at all
    if few_bits and SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError("its values are signed: shift them to 0 and above, all images alike, and save them unsigned")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode not in ("1", "L"):
        raise ValueError("0 is white in it (WhiteIsZero): invert its values, and save it with 0 as black")


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError for an image without pixels, or with more than MAX_PIXELS."""
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"an image of {width}x{height} pixels is beyond the limit of {MAX_PIXELS} pixels: cut it into tiles, or "
            "make it smaller"
        )


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _orientation(image: Image.Image) -> int:
    """1 to 8; damaged EXIF data count as none, as in detectron2."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


def header_size(file_name: str | Path) -> tuple[int, int]:
    """(height, width) of an image as it is shown, turned as its EXIF says; (0, 0) if the header cannot be read."""
    try:
        with open_regular(file_name) as file:
            image = Image.open(file, formats=FORMATS)
            turned = "exif" in image.info and _orientation(image) > 4
    except Exception:  # who decodes the file says what is wrong with it
        return 0, 0
    return (image.width, image.height) if turned else (image.height, image.width)


def read_rgb(file_name: str | Path) -> np.ndarray:
    """An image file of a dataset as uint8 RGB [H, W, 3], turned upright. Raises DataError.

    Warns, once per process, of the first image whose annotation may be drawn on the image that was not turned, and of
    the first of more than 8 bits that is nearly black.
    """
    opened = open_image(file_name)
    rgb = to_rgb(opened, file_name)
    for about, remedy in remarks(opened, rgb):
        warn_once(file_name, about, f"{remedy}. Others may be alike: tools/check_dataset.py lists them")
    return rgb


def warn_once(source: str | Path, about: str, remedy: str) -> None:
    """Warns of the first image that something is doubtful about, once per process."""
    if about not in _warned:
        _warned.add(about)
        logger.warning("%s: %s; %s", source, about, remedy)


def remarks(opened: Opened, rgb: np.ndarray) -> list[tuple[str, str]]:
    """(what is doubtful about an image that was read, what to do), where anything is."""
    found = []
    if opened.turned:
        found.append(
            (
                "image turned or mirrored by its EXIF orientation, which its size does not tell",
                "its annotation must be drawn on the image as viewers show it; make sure, and save the image turned, "
                "without the tag (PIL.ImageOps.exif_transpose)",
            )
        )
    deep = opened.sixteen_bits or opened.image.mode == "F"
    if deep and 0 < np.max(np.asarray(opened.image)) and rgb.max() < DIM:
        found.append((DIM_IMAGE, BRIGHTEN))
    return found


def to_rgb(opened: Opened, source: str | Path) -> np.ndarray:
    """The pixels of a decoded image as uint8 RGB [H, W, 3], by the rules of datasets/README.md.

    Grey is repeated, transparency dropped; of 16 bits the upper 8 are kept; float must lie in [0, 1]. Raises DataError
    for a kind of pixel that has no rule; `source` names the image in the message.
    """
    image = opened.image
    if image.mode in EIGHT_BITS:
        if "transparency" in image.info:  # of a palette, where Pillow warns unless it goes through RGBA
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and opened.sixteen_bits):
        grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
    elif image.mode == "F":
        grey = from_float(np.asarray(image), source)
    else:
        raise DataError(
            f"{source}: there is no rule for pixels of Pillow's mode {image.mode}; save it as an 8-bit grey or RGB "
            f"image, all images scaled alike; {ADVICE}"
        )
    return np.repeat(grey[..., None], 3, axis=2)


def from_float(values: np.ndarray, source: str | Path) -> np.ndarray:
    """Values in [0, 1] -> uint8 0..255, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (0 <= low and high <= 1):  # NaN fails too
        raise DataError(
            f"{source}: values of a float image must lie in [0, 1], got {low:g}..{high:g}; divide by the largest value "
            "possible, the same for all images, or give 8-bit values as uint8"
        )
    return np.rint(np.asarray(values, np.float64) * 255).astype(np.uint8)
