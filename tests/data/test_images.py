"""Opening images: the result of each kind of pixel, what is refused, and damaged files."""

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eco_m2f.data import images
from eco_m2f.data.given_images import rgb_from
from eco_m2f.data.images import DataError, open_image, read_rgb
from eco_m2f.data.panoptic_map import ids_to_rgb, read_classes, read_ids

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
THRICE = np.repeat(GREY[..., None], 3, axis=2)
FACTOR = float(os.environ.get("ECO_M2F_FUZZ", "1"))


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def grey16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16))


ALPHA = np.arange(35, dtype=np.uint8).reshape(5, 7)
KINDS = {  # name of the file -> (image, what is read)
    "rgb.png": (lambda: Image.fromarray(RGB), RGB),
    "rgb.bmp": (lambda: Image.fromarray(RGB), RGB),
    "rgb.tif": (lambda: Image.fromarray(RGB), RGB),
    "rgb.ppm": (lambda: Image.fromarray(RGB), RGB),
    "grey.png": (lambda: Image.fromarray(GREY), THRICE),
    "rgba.png": (lambda: Image.fromarray(np.dstack([RGB, ALPHA])), RGB),
    "la.png": (lambda: Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), THRICE),
    "bits.png": (lambda: Image.fromarray(GREY > 127), np.where(THRICE > 127, 255, 0)),
    "palette.png": (lambda: _palette(GREY % 3, [(9, 8, 7), (1, 2, 3), (250, 0, 4)]), None),
    "grey16.png": (lambda: grey16(GREY.astype(int) * 257), THRICE),
    "grey16.tif": (lambda: grey16(GREY.astype(int) * 256 + 255), THRICE),
    "grey16.pgm": (lambda: grey16(GREY.astype(int) * 257), THRICE),
    "float.tif": (lambda: Image.fromarray(GREY.astype(np.float32) / 255), THRICE),
    "cmyk.tif": (lambda: Image.fromarray(np.dstack([255 - RGB, 0 * GREY]), "CMYK"), RGB),
}


def _palette(indices: np.ndarray, colors: list) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "L").convert("P")
    image.putpalette([v for color in colors for v in color])
    image.putdata(indices.ravel().tolist())
    return image


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_a_kind_of_pixel_becomes(tmp_path, name):
    make, wanted = KINDS[name]
    wanted = np.array([(9, 8, 7), (1, 2, 3), (250, 0, 4)], np.uint8)[GREY % 3] if wanted is None else wanted
    found = read_rgb(save(make(), tmp_path / name))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def test_of_sixteen_bits_in_colour_the_upper_eight_are_kept_too(tmp_path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 256 + 7)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in chunks))
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), RGB)
    with pytest.raises(DataError, match="a.png.*RGB of 8 bits.*RGB;16B"):
        read_ids(tmp_path / "a.png", [1])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_an_image_that_leaves_most_levels_unused_causes_one_warning(tmp_path, caplog, monkeypatch):
    """12 bits in 16: the model does not see what the microscope resolved."""
    monkeypatch.setattr(images, "_warned", set())
    path = save(grey16(GREY.astype(int) * 16), tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert read_rgb(path).max() < 16
        read_rgb(path)
    assert caplog.text.count("fewer than 16 of the 256 levels") == 1 and str(path) in caplog.text


REFUSED = {
    "float beyond 1": (lambda p: save(Image.fromarray(GREY.astype(np.float32)), p / "x.tif"), r"\[0, 1\], got"),
    "float NaN": (lambda p: save(Image.fromarray(np.full((5, 7), np.nan, "f4")), p / "x.tif"), r"\[0, 1\], got nan"),
    "32-bit": (lambda p: save(Image.fromarray(GREY.astype(np.int32)), p / "x.tif"), "no rule.*mode I;"),
    "LAB": (lambda p: save(Image.fromarray(RGB, "LAB"), p / "x.tif"), "no rule.*mode LAB"),
    "GIF": (lambda p: save(Image.fromarray(GREY), p / "x.gif").rename(p / "x.png"), "none of JPEG, PNG"),
    "EPS": (lambda p: save(Image.fromarray(RGB), p / "x.eps").rename(p / "x.png"), "none of JPEG, PNG"),
    "pages": (
        lambda p: save(Image.fromarray(RGB), p / "x.tif", save_all=True, append_images=[Image.fromarray(RGB)]),
        "several pages",
    ),
    "bomb": (lambda p: _bomb(p / "x.png", 50_000, 40_000), "limit of 178956970 pixels"),
    "fifo": (lambda p: os.mkfifo(p / "x.png"), "not a regular file"),
    "folder": (lambda p: (p / "x.png").mkdir(), "not a regular file"),
    "absent": (lambda p: None, "image not found.*datasets/README.md"),
    "text": (lambda p: (p / "x.png").write_text("no image"), "none of JPEG, PNG"),
}


def _bomb(path: Path, width: int, height: int) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_has_no_rule_is_refused_by_name(tmp_path, case):
    make, message = REFUSED[case]
    make(tmp_path)
    path = next((p for p in tmp_path.iterdir()), tmp_path / "x.png")
    with pytest.raises(DataError, match=message) as caught:
        read_rgb(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "sample, tags, reason",
    [
        ("<i2", {339: 2}, "its values are signed"),
        ("i1", {339: 2}, "its values are signed"),
        ("<u2", {262: 0}, "0 means white in it"),
        ("<f4", {262: 0, 339: 3}, "0 means white in it"),
    ],
)
def test_a_tiff_whose_numbers_mean_something_else_is_refused(tmp_path, sample, tags, reason):
    bits = 8 * np.dtype(sample).itemsize
    tags = {256: 7, 257: 5, 258: bits, 259: 1, 262: 1, 273: 134, 277: 1, 278: 5, 279: 35 * bits // 8, 339: 1, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path = tmp_path / "image.tif"
    path.write_bytes(
        struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + GREY.astype(sample).tobytes()
    )
    with pytest.raises(DataError, match=f"image.tif: .*{reason}"):
        read_rgb(path)


def test_a_damaged_checksum_of_a_png_is_seen(tmp_path):
    """Pillow alone would go on and return other pixels."""
    path = tmp_path / "a.png"
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    data = bytearray(zlib.compress(rows, 0))
    data[20] ^= 1  # not compressed, so only the pixel changes
    chunks = _chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0)), _chunk(b"IDAT", zlib.compress(rows, 0))
    wrong = chunks[1].replace(zlib.compress(rows, 0), bytes(data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks[0] + wrong + _chunk(b"IEND", b""))
    with pytest.raises(DataError, match="a.png.*cannot be read"):
        read_rgb(path)


@pytest.mark.parametrize("pixels", [b"xxxx", zlib.compress(bytes(110))[:-8] + b"xxxxxxxx"])
def test_pixels_of_a_png_that_do_not_unpack_are_refused(tmp_path, pixels):
    """The checksums are right. The search for EXIF data finds the damage first."""
    path = tmp_path / "a.png"
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b""))
    for read in (read_rgb, rgb_from, lambda p: rgb_from(Image.open(p))):
        with pytest.raises(DataError, match="a.png.*cannot be read"):
            read(path)


def oriented(path: Path, value: int, pixels: np.ndarray = RGB) -> Path:
    exif = Image.Exif()
    exif[0x0112] = value
    return save(Image.fromarray(pixels), path, exif=exif)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_exif_orientation_is_applied_once(tmp_path, ending, value):
    turned = {
        **{1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1)},
        **{6: np.rot90(RGB, -1), 7: np.rot90(RGB[:, ::-1], -1), 8: np.rot90(RGB)},
    }
    path = oriented(tmp_path / f"a.{ending}", value)
    np.testing.assert_array_equal(read_rgb(path), turned[value])
    with Image.open(path) as image:
        np.testing.assert_array_equal(rgb_from(image), turned[value])


@pytest.mark.parametrize(
    "value, square, warnings", [(1, True, 0), (3, False, 1), (6, False, 0), (6, True, 1), (2, False, 1)]
)
def test_turning_that_the_size_does_not_show_causes_a_warning(tmp_path, caplog, monkeypatch, value, square, warnings):
    monkeypatch.setattr(images, "_warned", set())
    path = oriented(tmp_path / "a.png", value, RGB[:5, :5] if square else RGB)
    with caplog.at_level(logging.WARNING):
        read_rgb(path)
    assert caplog.text.count("EXIF orientation") == warnings
    assert open_image(path).turned == bool(warnings)


def test_labels_with_an_orientation_are_refused(tmp_path):
    path = oriented(tmp_path / "a.png", 3, ids_to_rgb(np.ones((2, 2), int)))
    with pytest.raises(DataError, match="a.png.*EXIF orientation 3"):
        read_ids(path, [1])


def test_a_palette_png_is_read_only_where_its_colours_are_listed_ids(tmp_path):
    ids = np.array([[0, 1, 2], [2, 2, 1]])
    by_colour = save(_palette(ids, [(0, 0, 0), (44, 1, 0), (9, 0, 0)]), tmp_path / "colours.png")
    np.testing.assert_array_equal(read_ids(by_colour, [300, 9]), np.array([0, 300, 9])[ids])
    for listed, reason in (([1, 2], "its indices are ids that the JSON lists"), ([5], "neither its colours nor")):
        with pytest.raises(DataError, match=f"colours.png.*{reason}.*ids_to_rgb"):
            read_ids(by_colour, listed)
    with pytest.raises(DataError, match="palette"):
        read_ids(by_colour)


def test_the_remedy_for_a_palette_png_works(tmp_path):
    ids = np.array([[0, 1, 2], [2, 2, 1]])
    png = save(_palette(ids, [(7, 7, 7), (44, 1, 0), (9, 0, 0)]), tmp_path / "a.png")
    Image.fromarray(ids_to_rgb(np.asarray(Image.open(png), "int32"))).save(png)
    np.testing.assert_array_equal(read_ids(png, [1, 2]), ids)


def test_classes_in_few_bits_are_indices_or_refused(tmp_path):
    classes = np.array([[0, 1, 2], [2, 3, 1]], np.uint8)
    palette = save(_palette(classes, [(9, 9, 8)] * 4), tmp_path / "palette.png", bits=2)
    np.testing.assert_array_equal(read_classes(palette), classes)
    rows = b"".join(b"\0" + bytes([(a << 4) + b, c << 4]) for a, b, c in classes.tolist())
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    (tmp_path / "grey.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in chunks))
    with pytest.raises(DataError, match="grey.png.*one channel of 8 bits.*L;4"):
        read_classes(tmp_path / "grey.png")


def test_a_palette_of_greys_must_agree_with_its_indices(tmp_path):
    classes = np.array([[0, 1, 2]], np.uint8)
    same = save(_palette(classes, [(i, i, i) for i in range(3)]), tmp_path / "same.png")
    np.testing.assert_array_equal(read_classes(same), classes)
    other = save(_palette(classes, [(i, i, i) for i in (0, 7, 255)]), tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other.png.*palette of greys, \[0, 7, 255\] for the indices \[0, 1, 2\]"):
        read_classes(other)


MEMORY = {
    "array": (RGB, RGB),
    "grey": (GREY, THRICE),
    "one channel": (GREY[..., None], THRICE),
    "transparent": (np.dstack([RGB, ALPHA]), RGB),
    "16 bits": (RGB.astype(np.uint16) * 256 + 3, RGB),
    "float": (RGB / 255, RGB),
    "single": ((RGB / 255).astype(np.float32), RGB),
    "bool": (GREY > 127, np.where(THRICE > 127, 255, 0)),
    "tensor": (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    "grey tensor": (torch.from_numpy(GREY), THRICE),
    "float tensor": (torch.from_numpy(RGB / 255).permute(2, 0, 1).requires_grad_(), RGB),
    "PIL": (Image.fromarray(RGB), RGB),
    "PIL grey": (Image.fromarray(GREY), THRICE),
    "PIL 16 bits": (grey16(GREY.astype(int) * 257), THRICE),
    "read only": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
}


@pytest.mark.parametrize("case", sorted(MEMORY))
def test_images_from_memory(case):
    given, wanted = MEMORY[case]
    np.testing.assert_array_equal(rgb_from(given), wanted)


@pytest.mark.parametrize("kind", ["array", "file", "PIL"])
def test_a_nearly_black_image_from_memory_causes_a_warning(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr(images, "_warned", set())
    values = GREY.astype(np.uint16) * 16
    path = save(grey16(values), tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert rgb_from({"array": values, "file": path, "PIL": Image.fromarray(values)}[kind]).max() < 16
    assert "fewer than 16 of the 256 levels" in caplog.text


def test_paths_are_images_too(tmp_path):
    path = save(Image.fromarray(RGB), tmp_path / "a.png")
    for given in (path, str(path)):
        np.testing.assert_array_equal(rgb_from(given), RGB)


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "got NoneType: give a path"),
        ([[1, 2]], "got list"),
        (np.zeros((0, 10, 3), np.uint8), "10x0 pixels is empty"),
        (Image.new("RGB", (0, 4)), "0x4 pixels is empty"),
        (np.zeros((3, 8, 9), np.uint8), r"\[H, W, 3\].*got uint8 \[3, 8, 9\]"),
        (np.zeros((8, 9, 2), np.uint8), r"got uint8 \[8, 9, 2\]"),
        (np.zeros(5, np.uint8), r"got uint8 \[5\]"),
        (np.zeros((4, 4), np.int64), "got int64: convert it"),
        (np.full((4, 4), 200.0), r"\[0, 1\], got 200..200"),
        (torch.zeros(8, 9, 3), r"tensor \[3, H, W\].*got \[8, 9, 3\]: permute"),
        (np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (20000, 20000, 3), (0, 0, 0)), "limit of 178956970"),
        (torch.zeros(3, 8, 9).to_sparse(), "got torch.float32, torch.sparse_coo.*to_dense"),
        (torch.zeros(3, 8, 9, device="meta"), "meta device"),
        (torch.quantize_per_tensor(torch.zeros(3, 8, 9), 0.1, 0, torch.quint8), "got torch.quint8.*dequantize"),
        (torch.zeros(3, 8, 9).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
        ("/none.png", "/none.png: image not found"),
    ],
)
def test_what_is_no_image_ends_in_one_message(given, message):
    with pytest.raises(ValueError, match=message):
        rgb_from(given)


def _samples(folder: Path) -> list[Path]:
    image = Image.fromarray(RGB.repeat(4, axis=0))
    names = ("a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.ppm")
    lzw = save(image, folder / "lzw.tif", compression="tiff_lzw")
    return [*(save(image, folder / name) for name in names), lzw, oriented(folder / "exif.png", 6)]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of many damaged files
def test_fuzz_damaged_files_are_read_or_refused_by_name(tmp_path, monkeypatch):
    """Flips, cuts, repeats or swaps bytes, mostly in the header with its sizes and offsets."""
    monkeypatch.setattr(images, "MAX_PIXELS", 1 << 20)  # a header may claim such a size correctly
    rng = np.random.default_rng(5)
    for sample in _samples(tmp_path):
        whole = sample.read_bytes()
        target = tmp_path / f"damaged{sample.suffix}"
        for _ in range(int(150 * FACTOR)):
            target.write_bytes(_damaged(whole, rng))
            for read in (read_rgb, lambda p: read_ids(p, [1]), read_classes):
                try:
                    found = read(target)
                except DataError as error:
                    assert str(target) in str(error)
                else:
                    assert found.size > 0 and found.shape[0] * found.shape[1] <= 1 << 20


def _damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        end = min(len(data), 64) if rng.random() < 0.7 else len(data)
        at, kind = int(rng.integers(0, max(end, 1))), rng.integers(0, 4)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at : at + 4] = rng.bytes(4)
        elif kind == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif at < len(data):
            data[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)
