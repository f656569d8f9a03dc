"""Segment ids, index planes and masks."""

import numpy as np
import pytest
from PIL import Image

from eco_m2f.data.panoptic_map import DataError, decode, ids_to_rgb, index_map, masks_of, read_ids


def test_png_round_trip(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, (1 << 24) - 1]], dtype=np.int32)
    Image.fromarray(ids_to_rgb(ids)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), ids)


@pytest.mark.parametrize("value", [-1, 1 << 24])
def test_ids_beyond_three_bytes_are_refused(value):
    with pytest.raises(ValueError, match=str(value)):
        ids_to_rgb(np.array([[value]]))


def test_unreadable_png_is_named(tmp_path):
    with pytest.raises(DataError, match="none.png: panoptic PNG not found"):
        read_ids(tmp_path / "none.png")
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match="half.png.*cannot be read"):
        read_ids(tmp_path / "half.png")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(DataError, match="grey.png.*mode L"):
        read_ids(tmp_path / "grey.png")


@pytest.mark.parametrize("count", [1, 3, 254, 255, 700])
def test_masks_equal_id_equality(count):
    rng = np.random.default_rng(count)
    segment_ids = rng.choice(np.arange(1, 1 << 24), size=count, replace=False).tolist()
    ids = rng.permutation(np.r_[segment_ids, np.zeros(50), rng.choice(segment_ids, 950 - count)])
    ids = ids.astype(np.int32).reshape(25, 40)
    planes = index_map(ids, segment_ids)
    assert planes.dtype == np.uint8 and planes.ndim == (2 if count < 255 else 3)
    left, masks = masks_of(planes, np.arange(count))
    np.testing.assert_array_equal(left, np.arange(count))
    np.testing.assert_array_equal(masks, ids[None] == np.array(segment_ids)[:, None, None])


@pytest.mark.parametrize("count", [3, 300])
def test_padding_is_void_and_lost_segments_are_left_out(count):
    segment_ids = list(range(1, count + 1))
    planes = index_map(np.array([segment_ids], dtype=np.int32), segment_ids)
    planes[0, 1] = 255  # the padding value of every transform: segment 2 disappears
    left, masks = masks_of(planes, np.arange(count))
    assert left.tolist() == [i for i in range(count) if i != 1]
    assert not masks[:, 0, 1].any() and masks.sum() == count - 1
    assert decode(planes)[0, 1] >= count


def test_only_wanted_positions_become_masks():
    left, masks = masks_of(index_map(np.array([[5, 6, 0, 7]], dtype=np.int32), [7, 6, 5]), np.array([0, 2]))
    assert left.tolist() == [0, 2]
    assert masks[:, 0].tolist() == [[False, False, False, True], [True, False, False, False]]


def test_nothing_wanted():
    left, masks = masks_of(index_map(np.zeros((3, 4), dtype=np.int32), []), np.array([], dtype=np.int64))
    assert left.size == 0 and masks.shape == (0, 3, 4)


def test_disagreement_names_ids_and_file():
    ids = np.array([[1, 2, 0]], dtype=np.int32)
    with pytest.raises(DataError, match=r"x.png: the PNG holds segment id\(s\) 2 that"):
        index_map(ids, [1], "x.png")
    with pytest.raises(DataError, match=r"x.png: segments_info lists id\(s\) 8, 9 that own no pixel"):
        index_map(ids, [1, 8, 2, 9], "x.png")
    with pytest.raises(
        DataError, match=r"none of the ids in segments_info \(7, 8\).* holds 1, 2: .* not delete anything"
    ):
        index_map(ids, [7, 8], "x.png")
    with pytest.raises(DataError, match="lists the id 0, which is void; a real segment needs another id"):
        index_map(ids, [0, 1, 2], "x.png")
    with pytest.raises(DataError, match=r"\(7 in all\)"):
        index_map(np.arange(8, dtype=np.int32)[None], [])
