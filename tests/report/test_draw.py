import numpy as np
import pytest

from eco_m2f.report.draw import draw_boxes, draw_panoptic

RED, BLUE = (200, 0, 0), (0, 0, 200)


def test_segments_take_their_colour_and_void_stays():
    image = np.full((8, 12, 3), 100, np.uint8)
    ids = np.zeros((8, 12), int)
    ids[:, 4:8], ids[:, 8:] = 7, 9
    drawn = draw_panoptic(
        image, ids, [{"id": 7, "category_id": 3}, {"id": 9, "category_id": 5}], {3: RED, 5: BLUE}, 1.0
    )
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    assert (drawn[:, :3] == 100).all()
    assert (drawn[:, 5] == RED).all()
    assert drawn[0, 10, 0] == 0 and drawn[0, 10, 2] > 150  # the second segment is a shade darker
    assert (drawn[:, 7] < drawn[:, 5]).any(axis=1).all()  # the outline between the two
    assert (image == 100).all(), "the image itself was changed"


def test_opacity_blends():
    image = np.full((4, 4, 3), 100, np.uint8)
    drawn = draw_panoptic(image, np.ones((4, 4), int), [{"id": 1, "category_id": 1}], {1: RED}, 0.5)
    assert (drawn == (150, 50, 50)).all()


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"\(4, 4\), \(4, 5\)"):
        draw_panoptic(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), [], {})


def test_boxes_are_outlines_in_the_colours_of_their_classes():
    image = np.full((8, 10, 3), 50, np.uint8)
    objects = [{"bbox": [2, 1, 4, 3], "category_id": 5}, {"bbox": [-3.0, 5.0, 50.0, 2.0], "category_id": 6}]
    drawn = draw_boxes(image, objects, {5: (200, 0, 0), 6: (0, 200, 0)})
    red, green = ((drawn == color).all(2) for color in ((200, 0, 0), (0, 200, 0)))
    wanted = np.zeros((8, 10), bool)
    wanted[1:4, 2:6] = True
    wanted[2, 3:5] = False
    assert (red == wanted).all()
    assert green[5:7].all() and green.sum() == 20  # what lies outside the image is drawn at its border
    assert (drawn[~red & ~green] == 50).all() and (image == 50).all()
