"""GFLOPs of DETR per exit, against the paper's and arithmetic by hand."""

import math

import pytest
import torch
from minis import CONFIGS, DETR, ECO_DETR, ECO_DETR_DC5, build, fill

from eco_m2f.costs import ExitCosts, analyze, at_test_size, exits_of, format_report, parameter_counts, read_image_sizes
from eco_m2f.engine.setup import build_model, load_cfg

EXITS = (2, 3, 4, 5, 6)
SIZE = (800, 1216)
TOKENS = 25 * 38


@pytest.fixture(scope="module")
def costs():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("uniform_", "normal_"):
            patch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)
        return ExitCosts(build_model(load_cfg(str(CONFIGS / ECO_DETR), ["MODEL.DEVICE", "cpu"])))


def encoder_layer(n: float) -> float:
    """Projections, output, FFN, weights times values, and two norms. The masked product of q and k does not count."""
    return 1_310_720 * n + 256 * n * n + 2_560 * n


def decoder_layer(n: float, queries: int = 100) -> float:
    own = queries * 4 * 256 * 256 + 2 * queries * queries * 256  # nothing masked: q.k counts
    cross = (2 * queries + 2 * n) * 256 * 256 + queries * n * 256
    return own + cross + queries * 2 * 256 * 2048 + 3 * 5 * 256 * queries


def test_the_papers_numbers(shared):
    """A layer at 886.5 tokens, COCO's mean. Encoder and decoder together are the paper's 9.92."""
    assert encoder_layer(886.5) / 1e9 == pytest.approx(1.3654, abs=1e-4)
    assert 6 * encoder_layer(886.5) / 1e9 == pytest.approx(8.19, abs=0.01)
    assert 6 * decoder_layer(886.5) / 1e9 == pytest.approx(1.73, abs=0.01)
    assert 6 * (encoder_layer(886.5) + decoder_layer(886.5)) / 1e9 == pytest.approx(9.92, abs=0.01)
    sizes = read_image_sizes(shared / "reference" / "coco_val2017_sizes.csv")
    tokens = [math.prod(-(-side // 32) for side in at_test_size(size, 800, 1333)) for size in sizes]
    assert sum(tokens) / len(tokens) == pytest.approx(886.5, abs=0.05)


def test_every_exit_of_an_image(costs):
    found = costs.details(SIZE)
    assert tuple(found) == EXITS
    for k, cost in found.items():
        assert cost["encoder"] == pytest.approx(k * encoder_layer(TOKENS) / 1e9, abs=1e-9)
        norm = 100 * 5 * 256  # of the last output; those of the auxiliary outputs have no use
        assert cost["decoder"] == pytest.approx((6 * decoder_layer(TOKENS) + norm) / 1e9, abs=1e-9)
        heads = 100 * (256 * 81 + 2 * 256 * 256 + 256 * 4)
        rest = cost["total"] - cost["backbone"] - cost["encoder"] - cost["decoder"]
        assert rest == pytest.approx((TOKENS * 2048 * 256 + heads) / 1e9, abs=1e-9)
        assert cost["postprocessing"] == 0 and cost["total_full"] == cost["total"]
    assert costs(SIZE)[6]["encoder"] == found[6]["encoder"]
    assert found[6]["encoder"] == pytest.approx(8.8712, abs=0.01)


def test_the_size_of_the_result_costs_nothing(costs):
    assert costs(SIZE, (480, 640)) == costs(SIZE)


@pytest.mark.parametrize("size", [(801, 1065), (33, 97)])
def test_sizes_that_are_no_multiple_of_32(costs, size):
    """DETR pads a batch to its largest image and no further."""
    n = math.prod(-(-side // 32) for side in size)
    assert costs(size)[3]["encoder"] == pytest.approx(3 * encoder_layer(n) / 1e9, abs=1e-9)


def test_a_res5_of_stride_16_has_more_tokens():
    """DETR-DC5 has the same layers. At 3495.5 tokens, COCO's mean, each costs 7.8 GFLOPs."""
    model = build(ECO_DETR_DC5)
    plain, dilated = (ExitCosts(m).details((64, 96)) for m in (build(ECO_DETR), model))
    for k in EXITS:
        per_token = 32 * 32 * 4 + 32 * 64 * 2 + 10 * 32  # the mini's width is 32, its FFN's 64
        for costs_, n in ((plain, 2 * 3), (dilated, 4 * 6)):
            assert costs_[k]["encoder"] == pytest.approx(k * (n * per_token + n * n * 32) / 1e9, rel=1e-9)
    assert 6 * encoder_layer(38 * 50) / 1e9 > 4 * 6 * encoder_layer(19 * 25) / 1e9


@pytest.mark.parametrize("k", [1, 3])
def test_an_exit_costs_what_a_parent_of_its_depth_does(k):
    shallow = build(DETR, "MODEL.DETR.ENC_LAYERS", k)
    assert ExitCosts(build(DETR), [1, 3, 6]).details((64, 96))[k] == ExitCosts(shallow, [k]).details((64, 96))[k]


def test_parameters_and_report():
    model = build(ECO_DETR)
    counts = parameter_counts(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == sum(counts[part] for part in ("backbone", "encoder", "decoder", "other"))
    assert counts["encoder"] == sum(p.numel() for p in model.head.transformer.encoder.parameters())
    report = analyze(model, (64, 96), [((60, 70), (30, 35))])
    assert report["model"] == "EcoDetr" and report["padded_size"] == [64, 96]
    assert report["mean"]["padded_area"] == 60 * 70
    assert "encoder" in format_report(report) and exits_of(model) == exits_of(build(DETR)) == EXITS


@torch.no_grad()
def test_what_runs_is_what_is_counted():
    """The products of the running model, counted by hooks on the linear layers of an encoder layer."""
    model = fill(build(DETR))
    n, dim, hidden = 6, 32, 64
    layer = model.head.transformer.encoder.layers[0]
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append(out.numel() * m.in_features))
        for m in (layer.linear1, layer.linear2)
    ]
    model([{"image": torch.zeros(3, 64, 96)}])
    for hook in hooks:
        hook.remove()
    counted = ExitCosts(model, [1])((64, 96))[1]["encoder"] * 1e9
    attention = n * 4 * dim * dim + n * n * dim
    assert counted == sum(seen) + attention + 10 * dim * n and sum(seen) == 2 * n * dim * hidden
