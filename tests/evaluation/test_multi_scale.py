"""TEST.AUG: the mean over resized and mirrored views, with a model simple enough for hand-made results."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from minis import CONFIGS, DETR, PARENT
from PIL import Image
from torch import nn
from torch.nn import functional as F

from eco_m2f.data.mappers import PanopticTestMapper
from eco_m2f.engine.setup import load_cfg
from eco_m2f.evaluation.multi_scale import MultiScale


class Columns(nn.Module):
    """Scores: the red channel at output size, and the horizontal position of a column, which mirroring reverses."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        (x,) = batch
        self.seen.append(tuple(x["image"].shape[1:]))
        red = F.interpolate(x["image"][None, :1].float(), (x["height"], x["width"]), mode="area")[0, 0]
        right = torch.linspace(0, 1, x["width"]).expand(x["height"], -1)
        return [{"sem_seg": torch.stack([red, right]), "exit": 3}]


def mapper(size: int) -> PanopticTestMapper:
    return PanopticTestMapper(augmentations=[T.ResizeShortestEdge(size, 1000)], image_format="RGB")


@pytest.fixture
def x(tmp_path) -> dict:
    """An image with a red left half, as the test loader maps it."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "image": torch.zeros(3, 5, 10), "height": 20, "width": 40}


def test_views_are_turned_back_before_their_mean_is_taken(x):
    model = Columns()
    (result,) = MultiScale(model, [mapper(20), mapper(40)], mirrored=True)([x])
    assert model.seen == [(20, 40)] * 2 + [(40, 80)] * 2
    assert result.keys() == {"sem_seg"}
    red, right = result["sem_seg"]
    assert (red[:, :19] > 150).all() and (red[:, 21:] < 50).all()  # what is in the image stays in its place
    torch.testing.assert_close(right, torch.full((20, 40), 0.5))  # what is not is as often left as right


def test_one_view_is_the_model_itself(x):
    model = Columns()
    (result,) = MultiScale(model, [mapper(20)], mirrored=False)([x])
    image = mapper(20)({"file_name": x["file_name"]})["image"]
    torch.testing.assert_close(result["sem_seg"], model([{**x, "image": image}])[0]["sem_seg"])


def test_a_thin_image_keeps_a_pixel_at_every_size(tmp_path):
    """As in evaluation, a side of less than half a pixel becomes one pixel."""
    Image.new("RGB", (3000, 2)).save(tmp_path / "thin.png")
    options = ["MODEL.DEVICE", "cpu", "TEST.AUG.MIN_SIZES", (32,), "TEST.AUG.MAX_SIZE", 64, "TEST.AUG.FLIP", True]
    cfg = load_cfg(str(CONFIGS / PARENT), options)
    views = MultiScale.from_config(cfg, model := Columns())
    views([{"file_name": str(tmp_path / "thin.png"), "height": 2, "width": 3000}])
    assert model.seen == [(1, 64)] * 2


def test_sizes_come_from_the_config():
    options = ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (32, 64), "TEST.AUG.FLIP", False]
    cfg = load_cfg(str(CONFIGS / PARENT), [*options, "TEST.AUG.MAX_SIZE", 96])
    made = MultiScale.from_config(cfg, Columns())
    resized = [m.augmentations.augs[0] for m in made.mappers]
    assert [(tuple(r.short_edge_length), r.max_size) for r in resized] == [((32, 32), 96), ((64, 64), 96)]
    assert not made.mirrored


@pytest.mark.parametrize(
    "config, options, message",
    [
        (DETR, (), "semantic segmentation only"),
        (PARENT, ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False), "semantic segmentation only"),
        (PARENT, ("TEST.AUG.MIN_SIZES", ()), "MIN_SIZES is empty"),
    ],
)
def test_what_it_is_not_for_is_refused_by_name(config, options, message):
    cfg = load_cfg(str(CONFIGS / config), ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", True, *options])
    model = Columns()
    model.annotation = "boxes" if config == DETR else "panoptic"
    with pytest.raises(ValueError, match=message):
        MultiScale.from_config(cfg, model)
