"""GFLOPs per exit: the published counts, other ways to count, and arithmetic by hand.

Where no source is named, the expected numbers were measured with the reference implementation and detectron2's
`FlopCountAnalysis`; they are the paper's wherever the paper is consistent.
"""

import copy
import functools
import math
from collections import Counter

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from minis import CONFIGS, ECO, MINI, PARENT, build, fill
from torch import nn

from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.evaluation.flops import (
    ExitCosts,
    OpTape,
    analyze,
    at_test_size,
    exits_of,
    format_report,
    padded_size,
    parameter_counts,
    postprocessing_flops,
    read_image_sizes,
)
from eco_m2f.modeling.encoders.msdeform import MSDeformEncoderLayer
from eco_m2f.modeling.mask2former.postprocessing import PostProcessor

pytestmark = pytest.mark.slow

BACKBONES = {
    "swin_t": "swin/maskformer2_swin_tiny_{}.yaml",
    "swin_s": "swin/maskformer2_swin_small_{}.yaml",
    "swin_b": "swin/maskformer2_swin_base_IN21k_384_{}.yaml",
    "r50": "maskformer2_R50_{}.yaml",
}
SCHEDULES = {"cityscapes": "bs16_90k", "coco": "bs16_50ep"}
EXITS = (2, 3, 4, 5, 6)
CITYSCAPES = (1024, 2048)
FIRST_VAL_IMAGE = ((800, 1216), (426, 640))  # of COCO: padded, and its own size
TOKENS = 43_008  # of the encoder at 1024x2048: 128 * 256 + 64 * 128 + 32 * 64
LAYER = TOKENS * (65_536 + 49_152 + 24_576 + 65_536 + 524_288 + 2_560)  # value, offsets, weights, output, FFN, norms
COCO_AREA = 907_771.0848  # pixels of a padded image: the mean over val2017 at 800 / 1333


@functools.cache
def model_of(dataset: str, backbone: str, eco: bool = False):
    name = BACKBONES[backbone].format(SCHEDULES[dataset])
    name = f"eco/eco_{name.removeprefix('swin/')}" if eco else name
    cfg = load_cfg(str(CONFIGS / dataset / "panoptic-segmentation" / name), ["MODEL.DEVICE", "cpu"])
    return build_model(cfg).to("meta")  # nothing is computed with its weights


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


# --- the published counts --------------------------------------------------------------------------------------------


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
    """What the paper prints as means of three of its models is this image."""
    cost = costs_of("coco", backbone)(*FIRST_VAL_IMAGE)[6]
    assert (cost["encoder"], cost["total"]) == (gflops(encoder), gflops(total))


@pytest.mark.parametrize("backbone, encoder", [("swin_t", 121.69), ("swin_b", 122.56), ("r50", 126.05)])
def test_encoder_means_over_coco_by_area(backbone, encoder):
    """The pixel decoder costs the same per pixel at every padded size, so that the mean is that of the mean area."""
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
    """Encoder and total are the paper's Tables 1, 4 and 6; the totals only if results have their image's own size."""
    model = model_of("coco", backbone)
    report = analyze(model, images=coco_sizes(shared))
    assert report["mean"]["num_images"] == 5000 and report["exits"] is report["mean"]["exits"]
    assert report["mean"]["padded_area"] == pytest.approx(COCO_AREA, rel=1e-12)
    for k, value in encoder.items():
        assert report["exits"][k]["pixel_decoder"] == gflops(value)
    for k, value in total.items():
        assert report["exits"][k]["total"] == gflops(value)


@pytest.mark.parametrize(
    "dataset, backbone, millions",
    [
        ("coco", "r50", 43.984),
        ("coco", "swin_t", 47.435),
        ("cityscapes", "swin_t", 47.406),
        ("coco", "swin_s", 68.753),
        ("coco", "swin_b", 106.918),
    ],
)
def test_parameters(dataset, backbone, millions):
    model = model_of(dataset, backbone)
    counts = parameter_counts(model)
    assert counts["total"] / 1e6 == pytest.approx(millions, abs=5e-4)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == counts["backbone"] + counts["pixel_decoder"] + counts["predictor"]


def test_a_gates_parameters_stand_apart():
    gate = build(ECO, "MODEL.ECO.POLICY", "LinearGate")
    counts = parameter_counts(gate)
    channels, exits = 128, 5
    assert counts.pop("exit_policy") == (channels + 1) * exits
    assert counts == parameter_counts(build(PARENT))


# --- the siblings ----------------------------------------------------------------------------------------------------

SIBLINGS = {
    "lite": "lite/lite_maskformer2_{}.yaml",
    "lite eco": "lite/lite_eco_maskformer2_{}.yaml",
    "rt": "rt/rt_maskformer2_{}.yaml",
    "proscale": "proscale/proscale111_maskformer2_{}.yaml",
    "proscale eco": "proscale/proscale333_eco_maskformer2_{}.yaml",
}
LABELS = {"swin_t": "swin_tiny", "swin_s": "swin_small", "swin_b": "swin_base_IN21k_384"}


@functools.cache
def sibling_of(sibling: str, dataset: str = "cityscapes", backbone: str = "swin_t", *opts):
    name = SIBLINGS[sibling].format(f"{LABELS[backbone]}_{SCHEDULES[dataset]}")
    path = CONFIGS / dataset / "panoptic-segmentation" / name
    return build_model(load_cfg(str(path), ["MODEL.DEVICE", "cpu", *opts])).to("meta")


@pytest.mark.parametrize("sibling, exits", [("lite", EXITS), ("lite eco", EXITS[1:])])
def test_lite_at_every_exit(sibling, exits):
    """The paper's 172.00 and 428.71 at the last; its exits are those after 2 to 5 cheap layers."""
    costs = ExitCosts(sibling_of(sibling))(CITYSCAPES)
    encoder = dict(zip(EXITS, (133.44, 143.08, 152.72, 162.35, 171.994)))
    assert tuple(costs) == exits
    assert [c["encoder"] for c in costs.values()] == gflops([encoder[k] for k in exits])
    assert costs[6]["total"] == gflops(428.71)


def test_a_cheap_lite_layer_by_hand():
    """The values of all tokens; everything else of the tokens of res5 and res4."""
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
    """The paper prints 79.78, which is the first image."""
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
    """What the paper prints as RT-M2F's mean; attention is quadratic in the area, so that the mean is another."""
    assert ExitCosts(sibling_of("rt", "coco"))(*FIRST_VAL_IMAGE)[1]["encoder"] == gflops(59.66)


def test_maskformer_and_its_parts():
    """An encoder whose query-key products count, for nothing is masked, and a pyramid of three levels."""
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
    """The pixel decoder at the last exit; a shallow Swin-T has maps of the same widths."""
    shallow = ("MODEL.SWIN.DEPTHS", (1, 1, 1, 1))
    layers = ("MODEL.PROSCALE.STAGES", stages, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", sum(stages))
    model = sibling_of("proscale", "cityscapes", "swin_t", *shallow, *layers, *opts)
    return ExitCosts(model, [sum(stages)])(CITYSCAPES)[sum(stages)]["encoder"]


def test_proscale_at_its_exits():
    """1.3978, 7.2404 and 31.4667 per layer of the stages; what is read of res3 to weigh res5 and res4 comes on top."""
    costs = ExitCosts(sibling_of("proscale eco"))(CITYSCAPES)
    assert [c["encoder"] for c in costs.values()] == gflops([135.348 - 2 * 31.4667, 135.348 - 31.4667, 135.348])
    opts = ("MODEL.PROSCALE.EXIT_AFTER_STAGES", True)
    costs = ExitCosts(sibling_of("proscale", "cityscapes", "swin_t", *opts), [1, 2, 3])(CITYSCAPES)
    weighing = [n * 256 * (4 + 1) / 1e9 for n in (2_048, 10_240, 10_240)]  # resizing, and 256 -> 1
    layers = [1.3978, 1.3978 + 7.2404, 1.3978 + 7.2404 + 31.4667]
    assert [c["encoder"] for c in costs.values()] == gflops([15.0203 + a + b for a, b in zip(layers, weighing)])


def test_parameters_of_the_siblings():
    rt = parameter_counts(sibling_of("rt", "coco"))
    assert rt["pixel_decoder"] / 1e6 == pytest.approx(11.443, abs=5e-4)
    assert rt["total"] / 1e6 == pytest.approx(53.46, abs=5e-3)
    lite = parameter_counts(sibling_of("lite", "coco"))
    assert lite == parameter_counts(model_of("coco", "swin_t"))


# --- arithmetic by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone, channels", [("swin_t", 96), ("swin_b", 128), ("r50", 256)])
def test_the_pixel_decoder_is_its_parts(backbone, channels):
    """A fixed part plus the layers; `channels` is the backbone's width at stride 4, doubled from stage to stage."""
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
    """4 corners of 8 heads' 32 channels at 3 levels' 4 points: what `grid_sampler` would count in a fallback."""
    per_layer = TOKENS * 8 * 3 * 4 * 4 * 32 / 1e9
    assert per_layer == pytest.approx(0.52848, abs=1e-5) and 6 * per_layer == pytest.approx(3.1709, abs=1e-4)
    for k, cost in costs_of("cityscapes", "swin_t").details(CITYSCAPES).items():
        assert cost["total_full"] - cost["total"] == pytest.approx(k * per_layer)
        assert cost["pixel_decoder_full"] - cost["pixel_decoder"] == pytest.approx(k * per_layer)


def flops_on_tape(module, *inputs) -> int:
    tape = OpTape()
    with torch.inference_mode(), tape:
        out = module(*inputs)
    return sum(op.flops for op in tape.ancestors([out]))


def test_an_encoder_layer_by_hand():
    dim, hidden, heads, levels, points = 8, 24, 2, 2, 4
    layer = MSDeformEncoderLayer(dim, hidden, 0.0, levels, heads, points).to("meta").eval()
    shapes = [(1, 2), (2, 4)]
    tokens = 10
    x, pos, reference = (torch.empty(1, tokens, n, device="meta") for n in (dim, dim, 2))
    linear = dim * (dim + 2 * heads * levels * points + heads * levels * points + dim + hidden) + hidden * dim
    assert flops_on_tape(layer, x, pos, reference[:, :, None], shapes) == tokens * (linear + 2 * 5 * dim)


def attention(masked: bool):
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool) if masked else None
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask)


LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), [(1, 6, 5, 7)], 3 * 4 * 8 * 3 * 9),
    "transposed conv": (nn.ConvTranspose2d(6, 8, 2, stride=2), [(1, 6, 3, 5)], 15 * 6 * 8 * 4),
    "linear": (nn.Linear(5, 7), [(2, 3, 5)], 6 * 5 * 7),
    "matrix product": (torch.matmul, [(2, 3, 5), (2, 5, 7)], 2 * 3 * 5 * 7),
    "einsum": (lambda a, b: torch.einsum("bqc,bchw->bqhw", a, b), [(2, 3, 5), (2, 5, 4, 6)], 2 * 3 * 5 * 24),
    "layer norm": (nn.LayerNorm(5), [(2, 3, 5)], 5 * 30),
    "layer norm without weights": (nn.LayerNorm(5, elementwise_affine=False), [(2, 3, 5)], 4 * 30),
    "group norm": (nn.GroupNorm(2, 6), [(1, 6, 3, 5)], 5 * 90),
    "batch norm": (nn.BatchNorm2d(6).eval(), [(1, 6, 3, 5)], 2 * 90),
    "bilinear": (nn.Upsample((4, 7), mode="bilinear"), [(1, 6, 3, 5)], 4 * 6 * 28),
    "nearest": (nn.Upsample((4, 7)), [(1, 6, 3, 5)], 6 * 28),
    "attention": (attention(masked=False), [(1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 4)], 2 * 5 * 7 * (3 + 4)),
    "masked attention": (attention(masked=True), [(1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 4)], 2 * 5 * 7 * 4),
    "what does not count": (lambda x: nn.MaxPool2d(2)(x.softmax(1) + x.relu()), [(1, 6, 4, 4)], 0),
}


@pytest.mark.parametrize("module, shapes, flops", LAYERS.values(), ids=LAYERS)
def test_an_operator_by_hand(module, shapes, flops):
    assert flops_on_tape(module, *(torch.randn(shape) for shape in shapes)) == flops


def test_what_nothing_depends_on_does_not_count():
    def forward(x):
        torch.mm(x, x)
        return x @ x[:, :2]

    assert flops_on_tape(forward, torch.randn(3, 3)) == 3 * 3 * 2


@pytest.mark.parametrize(
    "options, flops",
    [
        ({}, 5 * (4 * 64 * 96 + 4 * 50 * 70 + 7 * 50 * 70)),
        ({"semantic_on": False}, 5 * (4 * 64 * 96 + 4 * 50 * 70)),
        ({"resize_first": False}, 5 * (4 * 64 * 96 + 7 * 64 * 96) + 7 * 4 * 50 * 70),
    ],
)
def test_postprocessing_by_hand(options, flops):
    """5 queries, 7 classes: masks to the padded size and to the image's own, and the semantic product."""
    post = PostProcessor(7, frozenset(range(3)), **options)
    assert postprocessing_flops(post, 5, (64, 96), (50, 70)) == flops


# --- a trace of the running model ------------------------------------------------------------------------------------

SWIN = "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"
MINI_SWIN = [
    *("MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", "[2, 2, 2, 2]", "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]"),
]


@pytest.fixture(scope="module", params=["r50", "swin"])
def mini(request):
    """The model, and a function that builds its parent with another number of encoder layers."""
    config, opts = (PARENT, []) if request.param == "r50" else (SWIN, MINI_SWIN)
    return lambda *more: fill(build(config, *opts, *more))


@pytest.fixture
def traceable(monkeypatch):
    """torch.jit cannot trace an operator that takes a list of sizes: another takes its place, which counts nothing."""

    def uncounted(value, shapes, locations, weights):  # [N, Lq, M * D], from all it is given
        looked_at = (locations.sum((3, 4, 5)) + weights.sum((3, 4)))[..., None]  # [N, Lq, M, 1]
        return (looked_at + value.mean(1)[:, None]).flatten(2)

    def count(model, size, output):
        model = copy.deepcopy(model)
        published = model.sem_seg_head.decode  # makes all masks at full size, not only the last
        model.sem_seg_head.decode = lambda shared, state, aux: published(shared, state, aux=True)
        image = {"image": torch.zeros(3, *size), "height": output[0], "width": output[1]}
        trace = FlopCountAnalysis(model, [image]).set_op_handle("aten::scaled_dot_product_attention", attention_flops)
        return trace.unsupported_ops_warnings(False).uncalled_modules_warnings(False)

    monkeypatch.setattr("eco_m2f.ops.module.ms_deform_attn", uncounted)
    return count


def attention_flops(inputs, outputs) -> int:
    """fvcore knows no fused attention; of attention spelled out, it counts what is counted here."""
    (batch, heads, queries, dim), (_, _, keys, _) = get_shape(inputs[0]), get_shape(inputs[1])
    masked = inputs[3].type().kind() != "NoneType" and inputs[3].type().scalarType() == "Bool"
    return batch * heads * queries * keys * dim * (1 if masked else 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size, output", [((61, 87), (50, 99)), ((130, 33), (131, 32))])
def test_a_trace_of_the_running_model_counts_the_same(mini, traceable, size, output):
    model = mini()
    trace, costs = traceable(model, size, output), ExitCosts(model, [6])
    padded = padded_size(size, model.size_divisibility)
    assert padded != size
    by_module = {name.removeprefix("model."): n for name, n in trace.by_module().items() if n}
    counted = costs.measure(padded)[6].by_module
    assert counted.keys() <= by_module.keys() and len(counted) > 100
    # fvcore rounds an einsum to four digits: the predictor's masks from queries, and the semantic product
    predictor = "sem_seg_head.predictor"
    assert counted[predictor] == pytest.approx(by_module[predictor], rel=1e-4)
    assert {**counted, predictor: None} == {name: by_module[name] for name in counted} | {predictor: None}
    assert costs.details(padded, output)[6]["total"] * 1e9 == pytest.approx(trace.total(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_an_exit_costs_what_a_parent_of_its_depth_does(mini, k):
    """By part; an exit also has the layers after it, which it does not run."""
    shallow = mini("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", k)
    costs = ExitCosts(mini(), [1, 3, 6])
    for size in ((64, 96), (32, 160)):
        assert costs.details(size)[k] == ExitCosts(shallow, [k]).details(size)[k]


# --- means, and what a report says -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eco():
    return build(ECO)


def test_a_mean_is_that_of_its_images_and_measures_a_size_once(eco, monkeypatch):
    images = [((64, 96), (50, 70)), ((96, 64), (70, 50)), ((64, 96), (64, 96)), ((64, 96), (50, 70))]
    one_by_one = [ExitCosts(eco).details(*image) for image in images]
    runs = Counter()
    run = ExitCosts._run
    monkeypatch.setattr(ExitCosts, "_run", lambda self, size: runs.update([size]) or run(self, size))
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


def test_report_of_a_size_and_of_images(eco):
    images = [((60, 70), (30, 35)), ((64, 96), (128, 192))]
    report = analyze(eco, (33, 64), images)
    costs = ExitCosts(eco)
    assert (report["model"], report["size"], report["padded_size"]) == ("EcoMaskFormer", [33, 64], [64, 64])
    assert report["exits"] == costs.details((64, 64), (33, 64))
    assert report["mean"]["exits"] == costs.mean([((64, 96), (30, 35)), ((64, 96), (128, 192))])
    assert report["mean"]["num_images"] == 2 and report["mean"]["padded_area"] == 64 * 96
    assert report["params"] == sum(report["params_by_part"].values()) == sum(p.numel() for p in eco.parameters())
    text = format_report(report)
    assert "33x64, padded to 64x64" in text and "Mean GFLOPs of 2 images, 6144 pixels" in text
    for exits in (report["exits"], report["mean"]["exits"]):
        for k, cost in exits.items():
            row = "  ".join([f"{k:>4}", *(f"{value:{len(name)}.3f}" for name, value in cost.items())])
            assert row in text.splitlines()


def test_measuring_leaves_the_model_and_the_random_state_alone(eco):
    eco.train()
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in eco.state_dict().items()}
    analyze(eco, (64, 64))
    assert eco.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in eco.state_dict().items())
    eco.eval()


@pytest.mark.parametrize("size", [(1, 1), (32, 33), (64, 64), (61, 130)])
def test_padding_is_that_of_the_model(eco, size):
    batch = eco.preprocess([{"image": torch.zeros(3, *size)}])
    assert padded_size(size, eco.size_divisibility) == tuple(batch.tensor.shape[-2:])
    assert padded_size(size, 0) == padded_size(size, 1) == size


@pytest.mark.parametrize("size", [(426, 640), (640, 586), (333, 1000), (500, 71)])
@pytest.mark.parametrize("shortest, longest", [(800, 1333), (96, 200), (0, 1333)])
def test_test_size_is_that_of_the_mapper(size, shortest, longest):
    from eco_m2f.data.mappers import PanopticTestMapper

    opts = ["INPUT.MIN_SIZE_TEST", shortest, "INPUT.MAX_SIZE_TEST", longest]
    mapper = PanopticTestMapper(load_cfg(str(CONFIGS / PARENT), [*MINI, *opts]))
    image = mapper.to_tensor(torch.zeros(*size, 3, dtype=torch.uint8).numpy())
    assert at_test_size(size, shortest, longest) == tuple(image.shape[-2:])


# --- mistakes --------------------------------------------------------------------------------------------------------


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


def test_nothing_to_analyze(eco):
    with pytest.raises(ValueError, match="no images"):
        analyze(eco)
