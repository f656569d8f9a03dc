"""Run-length codes of an instance JSON's masks: equal to pycocotools', or refused before pycocotools reads them."""

import numpy as np
import pytest
from pycocotools import mask as rle

from eco_m2f.data.masks import run_lengths
from eco_m2f.data.schema import Rle

SIZE = (37, 53)


@pytest.mark.parametrize("seed", range(4))
def test_text_and_numbers_give_the_mask_that_was_encoded(seed):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((5, 7)) < 0.4, np.ones((8, 8)))[: SIZE[0], : SIZE[1]].astype(np.uint8)
    text = rle.encode(np.asfortranarray(mask))["counts"].decode()
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0))  # the first run is of zeros
    counts = np.diff([0, *changes, flat.size]).tolist()
    for given in (text, counts):
        np.testing.assert_array_equal(rle.decode(run_lengths(Rle(size=SIZE, counts=given), SIZE)), mask)


def test_polygons_are_merged_and_those_of_two_points_left_out():
    square = [10.0, 10.0, 20.0, 10.0, 20.0, 30.0, 10.0, 30.0]
    code = run_lengths([square, [1.0, 1.0, 5.0, 5.0]], SIZE)
    expected = np.zeros(SIZE, np.uint8)
    expected[10:30, 10:20] = 1
    np.testing.assert_array_equal(rle.decode(code), expected)
    with pytest.raises(ValueError, match="no polygon of three points"):
        run_lengths([[1.0, 1.0, 5.0, 5.0]], SIZE)


@pytest.mark.parametrize(
    "size, counts, message",
    [
        ((36, 53), [36 * 53], r"a mask of \(36, 53\).*in an image of \(37, 53\)"),
        (SIZE, [5, 7], "run lengths of 12 pixels in a mask of 1961"),
        (SIZE, [], "run lengths of 0 pixels"),
        (SIZE, [2**31 - 1, 7], "run lengths of 2147483654 pixels"),
        (SIZE, "", "run lengths of 0 pixels"),
        (SIZE, "\x00", "no code of pycocotools"),
        (SIZE, "é", "no code of pycocotools"),
        (SIZE, "P", "break off"),
        (SIZE, "P" * 100, "no code of pycocotools"),
        (SIZE, "N", "run lengths of -2 pixels"),
    ],
)
def test_codes_that_are_not_of_the_image_are_refused(size, counts, message):
    with pytest.raises(ValueError, match=message):
        run_lengths(Rle(size=size, counts=counts), SIZE)
