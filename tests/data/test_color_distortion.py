"""The colour distortion: each change against a plain computation."""

import colorsys

import numpy as np
import pytest

from eco_m2f.data.transforms import ColorAugSSD, ColorDistortion, JitterScale


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_nothing_drawn_changes_nothing(image):
    np.testing.assert_array_equal(ColorDistortion().apply_image(image), image)


def test_brightness_adds_and_clips(image):
    got = ColorDistortion(brightness=20.0).apply_image(image)
    np.testing.assert_array_equal(got, np.minimum(image.astype(int) + 20, 255))


def test_contrast_multiplies_and_clips(image):
    got = ColorDistortion(contrast=1.4).apply_image(image)
    np.testing.assert_array_equal(got, np.minimum(np.rint(image * 1.4), 255))


def test_contrast_comes_first_or_last(image):
    first = ColorDistortion(contrast=1.5, saturation=0.5).apply_image(image)
    last = ColorDistortion(contrast=1.5, saturation=0.5, contrast_last=True).apply_image(image)
    assert (first != last).any()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_saturation_and_hue_match_colorsys(image_format):
    rgb = np.array([[[200, 60, 40], [30, 120, 90], [80, 80, 80]]], dtype=np.uint8)
    flip = slice(None, None, -1 if image_format == "BGR" else 1)
    distortion = ColorDistortion(saturation=0.5, hue=15, image_format=image_format)
    got = distortion.apply_image(rgb[..., flip])[0][..., flip]
    for pixel, expected in zip(got, rgb[0], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(expected / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb((h + 30 / 360) % 1, s * 0.5, v))
        np.testing.assert_allclose(pixel, expected, atol=3)  # OpenCV rounds hue to 2 degrees


def test_hue_wraps_around():
    red = np.array([[[255, 0, 0]]], dtype=np.uint8)
    assert ColorDistortion(hue=-18).apply_image(red)[0, 0].argmax() == 0
    np.testing.assert_array_equal(ColorDistortion(hue=180).apply_image(red), red)


def test_each_change_is_drawn_half_the_time_within_its_range():
    np.random.seed(0)
    drawn = [ColorAugSSD("RGB").get_transform(np.zeros((2, 2, 3), np.uint8)) for _ in range(400)]
    for name, off, low, high in (
        ("brightness", 0, -32, 32),
        ("contrast", 1, 0.5, 1.5),
        ("saturation", 1, 0.5, 1.5),
        ("hue", 0, -18, 18),
    ):
        values = np.array([getattr(d, name) for d in drawn])
        assert 0.4 < (values != off).mean() < 0.6
        assert low <= values.min() < off < values.max() <= high
    assert 0.4 < np.mean([d.contrast_last for d in drawn]) < 0.6


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'L'"):
        ColorDistortion(image_format="L")


@pytest.mark.parametrize("shape, expected", [((100, 2), (10, 1)), ((2, 100), (1, 10)), ((100, 50), (10, 5))])
def test_jitter_scale_keeps_a_pixel(shape, expected):
    resize = JitterScale(0.1, 0.1, target_height=100, target_width=100).get_transform(np.zeros((*shape, 3), np.uint8))
    assert (resize.new_h, resize.new_w) == expected
