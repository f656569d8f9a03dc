"""Opens images: one way to open a file, and one rule for each kind of pixel. datasets/README.md states the rules.

Only a few formats are allowed, so that Pillow starts no other reader (EPS would start Ghostscript). The size in the
header is checked before anything is decoded. The EXIF orientation is applied, as in detectron2: the annotation of a
photo belongs to the image as a viewer shows it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import open_regular

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
MAX_PIXELS = 178_956_970  # of a file or an array; Pillow's own limit, twice the size that it warns of
EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")  # Pillow's modes
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # EXIF's tag
BITS, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # TIFF's tags and their values
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
DIM = 16  # of 256 levels: an image with 12 bits stored in 16 has no more
DIM_IMAGE = f"image of more than 8 bits that uses fewer than {DIM} of the 256 levels the model sees"
BRIGHTEN = "multiply the values of all images by one number, so that they fill the range, or save them as 8 bits"
ADVICE = "run tools/check_dataset.py on the dataset to list all such files"

logger = logging.getLogger(__name__)
_warned: set[str] = set()


class DataError(ValueError):
    """A file of a dataset is missing, unreadable or contradicts another. The message names it and the remedy."""


@dataclass(frozen=True)
class Opened:
    """A decoded file, turned upright.

    raw: Pillow's name for how the file stores pixels, such as "RGB;16B". format: such as "PNG". orientation: 1 to 8,
    from the EXIF data; it is already applied.
    """

    image: Image.Image
    raw: str
    format: str
    orientation: int

    @property
    def sixteen_bits(self) -> bool:
        """Whether the file has 16 bits per channel."""
        kind, _, bits = self.raw.partition(";")
        stored = bits.startswith("16") and kind != "BGR"  # BGR;16 has 16 bits for all three channels together
        return stored or self.image.mode in SIXTEEN_BITS or (self.format == "PPM" and self.image.mode == "I")

    @property
    def turned(self) -> bool:
        """Whether the EXIF data turned or mirrored it in a way that its size does not show."""
        return self.orientation in (2, 3, 4) or (self.orientation > 4 and self.image.width == self.image.height)


def open_image(file_name: str | Path, kind: str = "image", formats: tuple[str, ...] = FORMATS) -> Opened:
    """Decodes a file in one of `formats`. kind: what messages call it.

    Raises DataError if it is missing, no regular file, damaged, in another format, has several pages or more than
    MAX_PIXELS.
    """
    try:
        with open_regular(file_name) as file:
            return _decode(file, formats)
    except FileNotFoundError as error:
        raise DataError(
            f"{file_name}: {kind} not found; restore it, or remove it from the annotations (datasets/README.md shows "
            f"where each dataset's files belong); {ADVICE}"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{file_name}: {kind} cannot be read (none of {', '.join(formats)}, or damaged); restore it, or convert it "
            f"to PNG; {ADVICE}"
        ) from error
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"{file_name}: {kind} cannot be read ({reason}); restore it, or remove it; {ADVICE}") from error


def _decode(file: BinaryIO, formats: tuple[str, ...]) -> Opened:
    image = _checked(Image.open(file, formats=formats))
    if image.format == "PNG":  # its parts have checksums, but Pillow ignores those of the pixels
        image.verify()
        file.seek(0)
        image = Image.open(file, formats=formats)
    return upright(image)


def upright(image: Image.Image) -> Opened:
    """Decodes an image and turns it upright. Raises Pillow's errors for damage."""
    raw, kind = _raw_mode(image), image.format or ""
    if kind == "PNG":  # getexif would load it and hide an error
        image.load()
    orientation = _orientation(image)  # before load(), where Pillow itself turns a TIFF
    image.load()
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    return Opened(upright, raw, kind, orientation)


def _checked(image: Image.Image) -> Image.Image:
    """Checks an image that is not decoded yet. Raises ValueError for too many pixels, or several pages."""
    check_pixels(image.height, image.width)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG also holds previews
        raise ValueError("it holds several pages or frames: save each as a separate file")
    if image.format == "TIFF":
        _check_samples(image)
    return image


def _check_samples(image: Image.Image) -> None:
    """Raises ValueError for a TIFF with signed values or with 0 as white, because Pillow ignores both."""
    tags = image.tag_v2
    few_bits = max(np.atleast_1d(tags.get(BITS, 1))) <= 16  # for more bits there is no rule anyway
    if few_bits and SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError("its values are signed: add the same number to all images, and save them unsigned")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode not in ("1", "L"):
        raise ValueError("0 means white in it (WhiteIsZero): invert its values, and save it with 0 as black")


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError for an image without pixels, or with more than MAX_PIXELS."""
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"an image of {width}x{height} pixels exceeds the limit of {MAX_PIXELS} pixels: cut it into tiles, or "
            "make it smaller"
        )


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Damaged EXIF data count as 1, as in detectron2."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


def header_size(file_name: str | Path) -> tuple[int, int]:
    """(height, width) of an image after its EXIF orientation; (0, 0) if the header cannot be read."""
    try:
        with open_regular(file_name) as file:
            image = Image.open(file, formats=FORMATS)
            turned = "exif" in image.info and _orientation(image) > 4
    except Exception:  # decoding the file later reports the error
        return 0, 0
    return (image.width, image.height) if turned else (image.height, image.width)


def read_rgb(file_name: str | Path) -> np.ndarray:
    """An image file of a dataset as uint8 RGB [H, W, 3], turned upright. Raises DataError.

    Warns once per process of each kind of `remarks`.
    """
    opened = open_image(file_name)
    rgb = to_rgb(opened, file_name)
    for about, remedy in remarks(opened, rgb):
        warn_once(file_name, about, f"{remedy}. tools/check_dataset.py lists all such images")
    return rgb


def warn_once(source: str | Path, about: str, remedy: str) -> None:
    """Warns of a doubtful image, unless this process has already warned of the same `about`."""
    if about not in _warned:
        _warned.add(about)
        logger.warning("%s: %s; %s", source, about, remedy)


def remarks(opened: Opened, rgb: np.ndarray) -> list[tuple[str, str]]:
    """What is doubtful about an image that could be read: pairs (fact, remedy)."""
    found = []
    if opened.turned:
        found.append(
            (
                "image turned or mirrored by its EXIF orientation in a way that its size does not show",
                "check that its annotation was drawn on the image as viewers show it, and save the image turned, "
                "without the tag (PIL.ImageOps.exif_transpose)",
            )
        )
    deep = opened.sixteen_bits or opened.image.mode == "F"
    if deep and 0 < np.max(np.asarray(opened.image)) and rgb.max() < DIM:
        found.append((DIM_IMAGE, BRIGHTEN))
    return found


def to_rgb(opened: Opened, source: str | Path) -> np.ndarray:
    """The pixels of a decoded image as uint8 RGB [H, W, 3], by the rules of datasets/README.md.

    Grey is repeated, and transparency is dropped. Of 16 bits the upper 8 are kept. float must lie in [0, 1].
    Raises DataError for a kind of pixel that has no rule. `source` names the image in the message.
    """
    image = opened.image
    if image.mode in EIGHT_BITS:
        if "transparency" in image.info:  # Pillow warns of such a palette unless it is converted to RGBA first
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and opened.sixteen_bits):
        grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
    elif image.mode == "F":
        grey = from_float(np.asarray(image), source)
    else:
        raise DataError(
            f"{source}: there is no rule for pixels of Pillow's mode {image.mode}; save it as an 8-bit grey or RGB "
            f"image, with the same scale for all images; {ADVICE}"
        )
    return np.repeat(grey[..., None], 3, axis=2)


def from_float(values: np.ndarray, source: str | Path) -> np.ndarray:
    """Values in [0, 1] -> uint8 0..255, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (0 <= low and high <= 1):  # NaN fails too
        raise DataError(
            f"{source}: values of a float image must lie in [0, 1], got {low:g}..{high:g}; divide all images by the "
            "largest possible value, or give 8-bit values as uint8"
        )
    return np.rint(np.asarray(values, np.float64) * 255).astype(np.uint8)
