"""GFLOPs per exit, against published counts, other ways to count, and arithmetic by hand.

Numbers without a source were measured with the reference implementation and detectron2's `FlopCountAnalysis`. They are
the paper's wherever the paper is consistent.
"""

import functools
import math
from collections import Counter

import pytest
import torch
from minis import ECO, PARENT, build
from torch import nn
from zoo import model_of, sibling_of

from eco_m2f.costs import (
    ExitCosts,
    analyze,
    at_test_size,
    exits_of,
    padded_size,
    postprocessing_flops,
    read_image_sizes,
)
from eco_m2f.modeling.mask2former.postprocessing import PostProcessor

pytestmark = pytest.mark.slow

EXITS = (2, 3, 4, 5, 6)
CITYSCAPES = (1024, 2048)
FIRST_VAL_IMAGE = ((800, 1216), (426, 640))  # COCO's first image: padded size and own size
TOKENS = 43_008  # of the encoder at 1024x2048: 128 * 256 + 64 * 128 + 32 * 64
LAYER = TOKENS * (65_536 + 49_152 + 24_576 + 65_536 + 524_288 + 2_560)  # value, offsets, weights, output, FFN, norms
COCO_AREA = 907_771.0848  # pixels of a padded image: the mean over val2017 at 800 / 1333


@functools.cache
def costs_of(dataset: str, backbone: str, eco: bool = False) -> ExitCosts:
    return ExitCosts(model_of(dataset, backbone, eco))


@pytest.fixture(scope="module", autouse=True)
def free_the_models():
    yield
    model_of.cache_clear()
    costs_of.cache_clear()
    sibling_of.cache_clear()


def gflops(actual):
    return pytest.approx(actual, abs=0.01)


@pytest.mark.parametrize("eco", [False, True], ids=["parent", "eco"])
def test_swin_t_at_every_exit(eco):
    costs = costs_of("cityscapes", "swin_t", eco)(CITYSCAPES)
    assert tuple(costs) == EXITS
    assert [c["encoder"] for c in costs.values()] == gflops([155.263, 186.730, 218.196, 249.663, 281.130])
    assert [c["total"] for c in costs.values()] == gflops([411.981, 443.448, 474.914, 506.381, 537.848])


@pytest.mark.parametrize(
    "backbone, encoder, total",
    [("swin_s", 281.130, 724.289), ("swin_b", 283.143, 1051.189), ("r50", 291.196, 524.114)],
)
def test_backbones_at_the_last_exit(backbone, encoder, total):
    cost = costs_of("cityscapes", backbone, eco=True)(CITYSCAPES)[6]
    assert (cost["encoder"], cost["total"]) == (gflops(encoder), gflops(total))


@pytest.mark.parametrize("backbone, encoder, total", [("swin_t", 17.5706, 36.511), ("r50", 18.1998, 34.206)])
def test_a_small_image(backbone, encoder, total):
    costs = costs_of("cityscapes", backbone)((256, 512))
    assert costs[6]["encoder"] == pytest.approx(encoder, abs=1e-3)
    assert costs[6]["total"] == pytest.approx(total, abs=1e-3)
    assert costs[6]["encoder"] - costs[5]["encoder"] == pytest.approx(1.96667, abs=1e-5)


@pytest.mark.parametrize("backbone, encoder, total", [("swin_t", 130.407, 252.077), ("r50", 135.076, 245.448)])
def test_the_first_coco_image(backbone, encoder, total):
    """The paper's "means" of three of its models are those of this image."""
    cost = costs_of("coco", backbone)(*FIRST_VAL_IMAGE)[6]
    assert (cost["encoder"], cost["total"]) == (gflops(encoder), gflops(total))


@pytest.mark.parametrize("backbone, encoder", [("swin_t", 121.69), ("swin_b", 122.56), ("r50", 126.05)])
def test_encoder_means_over_coco_by_area(backbone, encoder):
    """The pixel decoder costs the same per pixel at all padded sizes, so the mean is the cost of the mean area."""
    costs = costs_of("coco", backbone)
    per_pixel = {k: cost["encoder"] / math.prod(CITYSCAPES) for k, cost in costs(CITYSCAPES).items()}
    for size in ((800, 1216), (1344, 352), (32, 64)):
        actual = {k: cost["encoder"] / math.prod(size) for k, cost in costs(size).items()}
        assert actual == pytest.approx(per_pixel, rel=1e-12)
    assert per_pixel[6] * COCO_AREA == gflops(encoder)
    assert (per_pixel[6] - per_pixel[5]) * COCO_AREA == pytest.approx(13.6207, abs=1e-4)
    if backbone == "swin_t":  # a gate that may choose exits up to K
        assert [per_pixel[k] * COCO_AREA for k in (5, 4)] == gflops([108.07, 94.45])


def coco_sizes(shared) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    sizes = read_image_sizes(shared / "reference" / "coco_val2017_sizes.csv")
    assert len(sizes) == 5000
    return [(at_test_size(size, 800, 1333), size) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, encoder, total",
    [
        ("swin_t", {6: 121.69, 5: 108.07, 4: 94.45}, {6: 235.57, 5: 221.95, 4: 208.33}),
        ("swin_b", {6: 122.56}, {6: 470.98}),
    ],
)
def test_means_over_the_5000_coco_images(shared, backbone, encoder, total):
    """Encoder and total as in the paper's Tables 1, 4 and 6. The totals need results of the image's own size."""
    model = model_of("coco", backbone)
    report = analyze(model, images=coco_sizes(shared), costs=costs_of("coco", backbone))
    assert report["mean"]["num_images"] == 5000 and report["exits"] is report["mean"]["exits"]
    assert report["mean"]["padded_area"] == pytest.approx(COCO_AREA, rel=1e-12)
    for k, value in encoder.items():
        assert report["exits"][k]["pixel_decoder"] == gflops(value)
    for k, value in total.items():
        assert report["exits"][k]["total"] == gflops(value)


@pytest.mark.parametrize("sibling, exits", [("lite", EXITS), ("lite eco", EXITS[1:])])
def test_lite_at_every_exit(sibling, exits):
    """At the last exit, the paper's 172.00 and 428.71. The paper's exits come after 2 to 5 cheap layers."""
    costs = ExitCosts(sibling_of(sibling))(CITYSCAPES)
    encoder = dict(zip(EXITS, (133.44, 143.08, 152.72, 162.35, 171.994)))
    assert tuple(costs) == exits
    assert [c["encoder"] for c in costs.values()] == gflops([encoder[k] for k in exits])
    assert costs[6]["total"] == gflops(428.71)


def test_a_cheap_lite_layer_by_hand():
    """All tokens are values; the rest runs on the tokens of res5 and res4."""
    cheap = TOKENS * 65_536 + 10_240 * (49_152 + 24_576 + 65_536 + 524_288 + 2_560)
    of = {k: cost.by_module for k, cost in ExitCosts(sibling_of("lite")).measure(CITYSCAPES).items()}
    name = "sem_seg_head.pixel_decoder.transformer"
    for k in EXITS:
        assert of[k][name] == (k - 1) * cheap + LAYER
        ran = [i for i in range(6) if f"{name}.encoder.layers.{i}" in of[k]]
        assert ran == [*range(k - 1), 5]


@pytest.mark.parametrize("backbone, encoder, total", [("swin_s", 171.99, 615.15), ("swin_b", 174.01, 942.05)])
def test_lite_on_other_backbones(backbone, encoder, total):
    """The paper's Table T1."""
    cost = ExitCosts(sibling_of("lite", "cityscapes", backbone), [6])(CITYSCAPES)[6]
    assert (cost["encoder"], cost["total"]) == (gflops(encoder), gflops(total))


def test_lites_mean_over_coco_by_area():
    """The paper prints 79.78, the cost of the first image."""
    costs = ExitCosts(sibling_of("lite", "coco"), [6])
    per_pixel = [costs(size)[6]["encoder"] / math.prod(size) for size in (CITYSCAPES, FIRST_VAL_IMAGE[0], (1344, 352))]
    assert per_pixel == pytest.approx([per_pixel[0]] * 3, rel=1e-12)
    assert per_pixel[0] * COCO_AREA == gflops(74.45)
    assert costs(*FIRST_VAL_IMAGE)[6]["encoder"] == gflops(79.78)


def test_rt_and_its_parts():
    costs = ExitCosts(sibling_of("rt"))
    assert costs.exits == (1,)
    assert costs(CITYSCAPES)[1]["encoder"] == gflops(129.768)
    of = costs.measure(CITYSCAPES)[1].by_module
    name = "sem_seg_head.pixel_decoder"
    coarse, middle, fine, dim = 32 * 64, 64 * 128, 128 * 256, 256
    csp = dim * (2 * 2 * dim + 3 * 10 * dim)  # two 1x1 of 512 channels; three times a 3x3 and a 1x1
    bn = 2 * dim
    linear = 4 * dim * dim + 2 * dim * 1024  # query, key, value, output; FFN
    projected = zip((coarse, middle, fine), (768, 384, 192))
    parts = {
        **{f"input_proj.{i}": n * (dim * channels + bn) for i, (n, channels) in enumerate(projected)},
        "transformer.encoder.layers.0": coarse * (linear + 2 * coarse * dim + 2 * 5 * dim),
        **{f"transformer.lateral_convs.{i}": n * (dim * dim + bn) for i, n in enumerate((coarse, middle))},
        **{f"transformer.fpn_blocks.{i}": n * (csp + 8 * bn) for i, n in enumerate((middle, fine))},
        **{f"transformer.downsample_convs.{i}": n * (9 * dim * dim + bn) for i, n in enumerate((middle, coarse))},
        **{f"transformer.pan_blocks.{i}": n * (csp + 8 * bn) for i, n in enumerate((middle, coarse))},
        "mask_features": fine * dim * dim,
    }
    assert {part: of[f"{name}.{part}"] for part in parts} == parts
    assert costs.measure(CITYSCAPES)[1].parts["pixel_decoder"] == sum(parts.values())


def test_rt_on_the_first_coco_image():
    """The paper's "mean" of RT-M2F. Attention is quadratic in the area, so the real mean differs."""
    assert ExitCosts(sibling_of("rt", "coco"))(*FIRST_VAL_IMAGE)[1]["encoder"] == gflops(59.66)


def test_maskformer_and_its_parts():
    """Its encoder's query-key products count, because nothing is masked. Its pyramid has three levels."""
    model = build("coco/panoptic-segmentation/maskformer/maskformer_R50_bs16_50ep.yaml", mini=False)
    measured = ExitCosts(model).measure(CITYSCAPES)
    of, name, dim = measured[6].by_module, "sem_seg_head.pixel_decoder", 256
    sizes = [256 * 512 // 4**i for i in range(4)]  # tokens of res2, res3, res4, res5
    tokens = sizes[3]
    layer = tokens * (4 * dim * dim + 2 * dim * 2048 + 2 * 5 * dim) + 2 * tokens**2 * dim
    parts = {
        "input_proj.0": tokens * dim * 2048,
        **{f"adapter_{i}": sizes[i - 1] * dim * (256 * 2 ** (i - 1) + 5) for i in (1, 2, 3)},
        **{f"layer_{i}": sizes[i - 1] * dim * (9 * dim + 5) for i in (1, 2, 3)},
        "mask_features": sizes[0] * dim * dim,
    }
    assert {part: of[f"{name}.{part}"] for part in parts} == parts
    for k, cost in measured.items():
        assert cost.parts["pixel_decoder"] == sum(parts.values()) + k * layer


@pytest.mark.parametrize(
    "stages, encoder",
    [
        ((1, 1, 1), 55.138),
        ((2, 2, 2), 95.24),
        ((3, 3, 3), 135.348),
        ((3, 1, 1), 57.93),
        ((1, 3, 1), 69.62),
        ((1, 1, 3), 118.07),
    ],
)
def test_proscale(stages, encoder):
    assert proscale_gflops(stages) == gflops(encoder)


def test_proscale_without_light_pixel_embedding():
    assert proscale_gflops((1, 1, 1), "MODEL.SEM_SEG_HEAD.MASK_BRANCH", "fpn") == gflops(132.45)


def proscale_gflops(stages, *opts) -> float:
    """GFLOPs of the pixel decoder at the last exit. A shallow Swin-T has maps of the same widths."""
    shallow = ("MODEL.SWIN.DEPTHS", (1, 1, 1, 1))
    layers = ("MODEL.PROSCALE.STAGES", stages, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", sum(stages))
    model = sibling_of("proscale", "cityscapes", "swin_t", *shallow, *layers, *opts)
    return ExitCosts(model, [sum(stages)])(CITYSCAPES)[sum(stages)]["encoder"]


def test_proscale_at_its_exits():
    """A layer of the stages costs 1.3978, 7.2404 and 31.4667. Recalibration of res5 and res4 adds to that."""
    costs = ExitCosts(sibling_of("proscale eco"))(CITYSCAPES)
    assert [c["encoder"] for c in costs.values()] == gflops([135.348 - 2 * 31.4667, 135.348 - 31.4667, 135.348])
    opts = ("MODEL.PROSCALE.EXIT_AFTER_STAGES", True)
    costs = ExitCosts(sibling_of("proscale", "cityscapes", "swin_t", *opts), [1, 2, 3])(CITYSCAPES)
    weighing = [n * 256 * (4 + 1) / 1e9 for n in (2_048, 10_240, 10_240)]  # resizing, and 256 -> 1
    layers = [1.3978, 1.3978 + 7.2404, 1.3978 + 7.2404 + 31.4667]
    assert [c["encoder"] for c in costs.values()] == gflops([15.0203 + a + b for a, b in zip(layers, weighing)])


@pytest.mark.parametrize("backbone, channels", [("swin_t", 96), ("swin_b", 128), ("r50", 256)])
def test_the_pixel_decoder_is_its_parts(backbone, channels):
    """A fixed part plus the layers; `channels` is the backbone's width at stride 4, which doubles with each stage."""
    measured = costs_of("cityscapes", backbone).measure(CITYSCAPES)
    quarter, maps = 256 * 512, (32 * 64, 64 * 128, 128 * 256)
    parts = {
        "input_proj": sum(n * 256 * (c * channels + 5) for n, c in zip(maps, (8, 4, 2))),
        "adapter_1": quarter * 256 * (channels + 5),
        "layer_1": quarter * 256 * (9 * 256 + 5),
        "mask_features": quarter * 256 * 256,
    }
    name = "sem_seg_head.pixel_decoder"
    for k, cost in measured.items():
        of = cost.by_module
        projections = sum(of[f"{name}.input_proj.{i}"] for i in range(3))
        others = {part: of[f"{name}.{part}"] for part in ("adapter_1", "layer_1", "mask_features")}
        assert {"input_proj": projections, **others} == parts
        assert of[f"{name}.transformer"] == k * LAYER
        assert cost.parts["pixel_decoder"] == sum(parts.values()) + k * LAYER
        resizing = 4 * 256 * quarter  # between the modules: counted in all, but not for the pixel decoder
        assert cost.flops == sum(cost.parts.values()) + resizing


def test_the_full_convention_adds_the_deformable_core():
    """4 corners, 8 heads of 32 channels, 3 levels of 4 points: the count of `grid_sampler` in a fallback."""
    per_layer = TOKENS * 8 * 3 * 4 * 4 * 32 / 1e9
    assert per_layer == pytest.approx(0.52848, abs=1e-5) and 6 * per_layer == pytest.approx(3.1709, abs=1e-4)
    for k, cost in costs_of("cityscapes", "swin_t").details(CITYSCAPES).items():
        assert cost["total_full"] - cost["total"] == pytest.approx(k * per_layer)
        assert cost["pixel_decoder_full"] - cost["pixel_decoder"] == pytest.approx(k * per_layer)


@pytest.mark.parametrize(
    "options, flops",
    [
        ({}, 5 * (4 * 64 * 96 + 4 * 50 * 70 + 7 * 50 * 70)),
        ({"semantic_on": False}, 5 * (4 * 64 * 96 + 4 * 50 * 70)),
        ({"resize_first": False}, 5 * (4 * 64 * 96 + 7 * 64 * 96) + 7 * 4 * 50 * 70),
    ],
)
def test_postprocessing_by_hand(options, flops):
    """5 queries, 7 classes: masks resized to the padded size and the image's own, and the semantic product."""
    post = PostProcessor(7, frozenset(range(3)), **options)
    assert postprocessing_flops(post, 5, (64, 96), (50, 70)) == flops


@pytest.fixture(scope="module")
def eco():
    return build(ECO)


def test_a_mean_is_that_of_its_images_and_measures_a_size_once(eco, monkeypatch):
    images = [((64, 96), (50, 70)), ((96, 64), (70, 50)), ((64, 96), (64, 96)), ((64, 96), (50, 70))]
    one_by_one = [ExitCosts(eco).details(*image) for image in images]
    runs = Counter()
    measure = ExitCosts.measure
    monkeypatch.setattr(ExitCosts, "measure", lambda self, size: runs.update([size]) or measure(self, size))
    mean = ExitCosts(eco).mean(iter(images))
    assert runs == {(64, 96): 1, (96, 64): 1}
    for k in EXITS:
        for name, value in mean[k].items():
            assert value == pytest.approx(sum(cost[k][name] for cost in one_by_one) / 4)


def test_exits_of():
    assert exits_of(build(ECO, "MODEL.ECO.EXITS", "[1, 4]", "MODEL.ECO.EXIT", 4, "MODEL.ECO.EXITS_PER_STEP", 2)) == (
        1,
        4,
    )
    layers = "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"
    assert exits_of(build(PARENT)) == EXITS
    assert exits_of(build(PARENT, layers, 3)) == (2, 3)
    assert exits_of(build(PARENT, layers, 1)) == (1,)


@pytest.mark.parametrize("size", [(1, 1), (32, 33), (64, 64), (61, 130)])
def test_padding_is_that_of_the_model(eco, size):
    batch = eco.preprocess([{"image": torch.zeros(3, *size)}])
    assert padded_size(size, eco.size_divisibility) == tuple(batch.tensor.shape[-2:])
    assert padded_size(size, 0) == padded_size(size, 1) == size


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_sizes_that_are_none(eco, size):
    for call in (ExitCosts(eco), ExitCosts(eco).details, lambda s: padded_size(s, 32), lambda s: analyze(eco, s)):
        with pytest.raises(ValueError, match=f"at least 1 pixel, got {size[0]} x {size[1]}"):
            call(size)


def test_exits_that_there_are_not(eco):
    with pytest.raises(ValueError, match=r"\[2, 7\] are not all offered: \[1, 2, 3, 4, 5, 6\]"):
        ExitCosts(eco, [2, 7])
    with pytest.raises(ValueError, match="not all offered"):
        ExitCosts(eco, [])


def test_a_model_without_exits():
    with pytest.raises(ValueError, match="Linear has no backbone and .* so no exits: .* MaskFormer or EcoMaskFormer"):
        ExitCosts(nn.Linear(2, 2))
