"""Sizes from a CSV, and of images at test time."""

import pytest
import torch
from minis import CONFIGS, MINI, PARENT

from eco_m2f.costs import at_test_size, read_image_sizes
from eco_m2f.engine.setup import load_cfg


def test_sizes_from_a_csv(tmp_path):
    path = tmp_path / "sizes.csv"
    path.write_text('\ufeffwidth,name,height\n640,a,480\n33,"b,c",7\n', encoding="utf-8")
    assert read_image_sizes(path) == [(480, 640), (7, 33)]


@pytest.mark.parametrize(
    "content, parts",
    [
        ("id,height\n1,5\n", ["lacks", "'width'", "'id', 'height'"]),
        ("", ["lacks", "'height', 'width'"]),
        ("height,width\n", ["no rows"]),
        ("height,width\n5,6\n5,0\n", ["line 3", "height '5', width '0'"]),
        ("height,width\n5,tall\n", ["line 2", "'tall'"]),
        ("height,width\n5\n", ["line 2", "None"]),
        ("height,width\n5,6.5\n", ["line 2", "'6.5'"]),
        ("height,width\n5,6\x00\n", ["sizes.csv"]),
        ("\xff\xd8\xff\xe0", ["lacks"]),
    ],
)
def test_csv_that_is_none(tmp_path, content, parts):
    path = tmp_path / "sizes.csv"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError) as error:
        read_image_sizes(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("size", [(426, 640), (640, 586), (333, 1000), (500, 71)])
@pytest.mark.parametrize("shortest, longest", [(800, 1333), (96, 200), (0, 1333)])
def test_test_size_is_that_of_the_mapper(size, shortest, longest):
    from eco_m2f.data.mappers import PanopticTestMapper

    opts = ["INPUT.MIN_SIZE_TEST", shortest, "INPUT.MAX_SIZE_TEST", longest]
    mapper = PanopticTestMapper(load_cfg(str(CONFIGS / PARENT), [*MINI, *opts]))
    image = mapper.to_tensor(torch.zeros(*size, 3, dtype=torch.uint8).numpy())
    assert at_test_size(size, shortest, longest) == tuple(image.shape[-2:])
