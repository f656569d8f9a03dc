"""Costs in closed form against those of a run, to the last FLOP, at sizes of all kinds."""

import math

import pytest
from minis import CONFIGS, ECO, ECO_DETR, ECO_DETR_DC5
from on_meta import build_on_meta

from eco_m2f.costs import ExitCosts
from eco_m2f.costs.closed_form import CHECKS, DIRECTLY, Combinations, SizeCounts, SizeFunctions
from eco_m2f.engine.setup import load_cfg

COCO = "coco/panoptic-segmentation/"
SHALLOW = ("MODEL.SWIN.DEPTHS", (2, 2, 2, 2))  # a plain and a shifted block of each stage; more would be alike
MODELS = {
    "r50": (ECO, ()),
    "swin_t": (COCO + "eco/eco_maskformer2_swin_tiny_bs16_50ep.yaml", SHALLOW),
    "swin_b": (COCO + "eco/eco_maskformer2_swin_base_IN21k_384_bs16_50ep.yaml", SHALLOW),
    "detr": (ECO_DETR, ()),
    "dc5": (ECO_DETR_DC5, ()),
    "lite": (COCO + "lite/lite_eco_maskformer2_swin_small_bs16_50ep.yaml", SHALLOW),
    "proscale": (COCO + "proscale/proscale333_eco_maskformer2_R50_bs16_50ep.yaml", ()),
    "rt": (COCO + "rt/rt_maskformer2_swin_tiny_bs16_50ep.yaml", SHALLOW),
    "maskformer": (COCO + "maskformer/maskformer_R50_bs16_50ep.yaml", ()),
    "timm": (ECO, ("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "efficientnet_lite0")),
}
FIRST = ((800, 1216), (800, 1088))  # counted directly
SIZES = ((1216, 800), (32, 32), (32, 1376), (736, 992), (1024, 2048))
ODD = ((1, 1), (35, 99), (801, 1065), (427, 1333), (2047, 750))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_size_costs_what_a_run_counts(name, monkeypatch):
    if name == "timm":
        pytest.importorskip("timm")
    config, opts = MODELS[name]
    costs, ran, measure = (
        ExitCosts(build_on_meta(load_cfg(str(CONFIGS / config), ["MODEL.DEVICE", "cpu", *opts]))),
        [],
        ExitCosts.measure,
    )
    monkeypatch.setattr(ExitCosts, "measure", lambda self, size: ran.append(size) or measure(self, size))
    sizes = (*FIRST, *SIZES, *(ODD if name in ("detr", "dc5") else ()))  # the others pad to multiples of 32
    found = {size: costs.details(size, (426, 640)) for size in sizes}
    assert len(set(ran)) == len(ran) <= 12 and not {*SIZES, *ODD} & set(ran)
    told = {size: found[size] for size in found if size not in ran}
    monkeypatch.setattr(SizeCounts, "__call__", lambda self, size: self._count(size))
    assert told == {size: costs.details(size, (426, 640)) for size in told} and set(told) >= set(SIZES)


def test_few_sizes_are_counted_directly_and_each_once():
    counted = []
    counts = SizeCounts(lambda size: counted.append(size) or (math.prod(size),), SizeFunctions([1]))
    assert DIRECTLY == 2
    for size in ((5, 7), (5, 7), (6, 8), (5, 7)):
        assert counts(size) == (math.prod(size),)
    assert counted == [(5, 7), (6, 8)]
    assert counts((100, 3)) == (300,)
    assert counted == [(5, 7), (6, 8), *CHECKS]  # two sizes determine 1 and the area


def area_and(extra):
    return lambda size: (math.prod(size), 3 * math.prod(size) ** 2 + extra(*size))


@pytest.mark.parametrize(
    "extra",
    [
        lambda h, w: h,
        lambda h, w: (h // 2) * (w // 2),
        lambda h, w: math.prod(-(-n // 7) for n in (h, w)),
        lambda h, w: h > 1000,
    ],
    ids=["one side", "rounded down", "windows", "a step"],
)
def test_what_is_no_combination_is_counted_directly(extra):
    """The checks notice it, and no later size is computed in closed form."""
    count = area_and(extra)
    counts = SizeCounts(count, SizeFunctions([1, 2], squared=[1]))
    for size in ((5, 7), (800, 1216), (6, 8), (333, 500), (640, 1999), (1200, 1), (2, 2)):
        assert counts(size) == count(size)


def test_windows_and_rounded_maps_are_known():
    def windows_and_map(h: int, w: int) -> int:
        return 5 * math.prod(7 * -(-(-(-n // 4)) // 7) for n in (h, w)) + (h + 1) // 2 * ((w + 1) // 2)

    count = area_and(windows_and_map)
    ran = []
    counts = SizeCounts(lambda size: ran.append(size) or count(size), SizeFunctions([1, 2, 4], [1], [7]))
    for size in ((5, 7), (800, 1216), (6, 8), (333, 500), (640, 1999), (1200, 1), (2, 2)):
        assert counts(size) == count(size)
    assert not {(333, 500), (640, 1999), (1200, 1), (2, 2)} & set(ran)


def test_sizes_that_are_no_multiple_of_the_step_are_counted_directly():
    """At multiples of 32 a map of stride 4 has a sixteenth of the pixels. At other sizes the functions differ."""
    count = area_and(lambda h, w: (h // 4) * (w // 4))
    counts = SizeCounts(count, SizeFunctions([4], squared=[1]), step=32)
    for size in ((64, 64), (800, 1216), (640, 320), (333, 500), (32, 1333)):
        assert counts(size) == count(size)


def test_combinations_tell_what_they_learned_and_nothing_else():
    form = Combinations()
    assert form.counts([1, 6]) is None
    assert form.learn([1, 6], [20]) and form.counts([1, 6]) == (20,) and form.counts([2, 12]) == (40,)
    assert form.counts([1, 10]) is None
    assert form.learn([1, 10], [32]) and form.counts([1, 0]) == (2,) and form.counts([1, 100]) == (302,)
    assert form.learn([1, 7], [23]) and not form.learn([1, 7], [24])
    assert form.counts([1, 8]) == (26,)
