"""Reports on a model: its parameters and costs."""

import pytest
import torch
from minis import ECO, PARENT, build
from zoo import model_of, sibling_of

from eco_m2f.costs import ExitCosts, analyze, format_report, parameter_counts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def free_the_models():
    yield
    model_of.cache_clear()
    sibling_of.cache_clear()


@pytest.fixture(scope="module")
def eco():
    return build(ECO)


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


def test_parameters_of_the_siblings():
    rt = parameter_counts(sibling_of("rt", "coco"))
    assert rt["pixel_decoder"] / 1e6 == pytest.approx(11.443, abs=5e-4)
    assert rt["total"] / 1e6 == pytest.approx(53.46, abs=5e-3)
    lite = parameter_counts(sibling_of("lite", "coco"))
    assert lite == parameter_counts(model_of("coco", "swin_t"))


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


def test_nothing_to_analyze(eco):
    with pytest.raises(ValueError, match="no images"):
        analyze(eco)
