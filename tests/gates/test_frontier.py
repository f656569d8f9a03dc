"""Frontiers and the search for a budget, on a small derived dataset in which depth helps a part of the images."""

import csv
import math

import numpy as np
import pytest
from derived_by_depth import EXITS, GFLOPS, make_derived

from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.exits import exit_targets, utility
from eco_m2f.files import write_csv
from eco_m2f.gates.frontier import GateFitter, fixed_rows, format_row, frontier, header, measure, oracle_row
from eco_m2f.gates.search import search_budget


def test_rows_hold_the_exact_sums(val):
    choice = np.random.default_rng(0).choice(EXITS, len(val))
    row = measure(val, choice, policy="gate", beta=0.1, max_exit=6, loss="hard_ce")
    exact = val.exact_quality(choice)
    assert row.exact == {column: 100 * exact[column] for column in ("pq", "pq_things", "pq_stuff")}
    assert row.quality == 100 * val.mean_quality(choice) and row.mean_exit == np.mean(choice)
    assert row.total_gflops == pytest.approx(np.mean([GFLOPS[k] for k in choice]))
    assert row.images == {k: int((choice == k).sum()) for k in EXITS}


def test_fixed_rows(val):
    rows = fixed_rows(val)
    assert [(r.mean_exit, r.total_gflops, r.encoder_gflops) for r in rows] == [(k, GFLOPS[k], 10.0 * k) for k in EXITS]
    assert rows[0].exact["pq"] < rows[1].exact["pq"] < rows[2].exact["pq"]


def test_frontier_measures_the_gates_it_holds(train, val):
    rows = list(frontier(train, val, betas=[0.0, 0.005, 2.0], max_exits=[6, 4], losses=["hard_ce", "soft_ce"]))
    assert [r.policy for r in rows] == ["fixed"] * 3 + ["oracle", "gate", "mixture", "gate", "mixture"] * 6
    for row in rows[3:]:
        if row.policy == "gate":
            choice = row.gate.choose(torch_features(val)).numpy()
            assert row.exact["pq"] == 100 * val.exact_quality(choice)["pq"] and max(choice) <= row.max_exit
            assert row.gate.exits == tuple(k for k in EXITS if k <= row.max_exit)
            assert row.gate.results["pq"] == row.exact["pq"] and row.gate.results["measured_on"] == "toy_1"
            assert row.gate.parent_sha256 == "a" * 64
        elif row.policy == "oracle":
            targets = exit_targets(val.quality, EXITS, row.beta, row.max_exit)
            assert row.mean_exit == targets.double().mean().item()
    assert [r.policy for r in rows if r.gain] == ["oracle", "gate", "gate"] * 6
    for gate, mixture in ((a, b) for a, b in zip(rows, rows[1:]) if b.policy == "mixture"):
        assert (gate.beta, gate.max_exit, gate.loss) == (mixture.beta, mixture.max_exit, mixture.loss)
        assert mixture.total_gflops == pytest.approx(gate.total_gflops) and sum(mixture.images.values()) == len(val)
        assert gate.gain.gain == pytest.approx(gate.score - mixture.score) and gate.gain.score == mixture.score
        assert gate.gate.results["gain"] == gate.gain.gain and gate.gate.results["gain_p"] == gate.gain.p


def torch_features(dataset):
    import torch

    return torch.from_numpy(dataset.features)


def test_the_gate_beats_what_costs_the_same(train, val):
    """Its utility is between that of the best fixed exit and that of the oracle."""
    beta = 0.008
    row = GateFitter(train, val).fit(beta, 6)
    u = utility(val.quality, EXITS, beta)
    choice = row.gate.choose(torch_features(val))
    reached = u[np.arange(len(val)), val.columns(choice)].mean().item()
    assert u.mean(dim=0).max().item() + 0.002 < reached <= u.max(dim=1).values.mean().item()


def test_a_larger_beta_costs_less_and_the_largest_is_the_first_exit(train, val):
    rows = [r for r in frontier(train, val, [0.0, 0.002, 0.01, 2.0], [6]) if r.policy == "gate"]
    gflops = [r.total_gflops for r in rows]
    assert gflops == sorted(gflops, reverse=True) and gflops[-1] == GFLOPS[2] < gflops[0]
    oracle = [oracle_row(val, beta, 6).total_gflops for beta in (0.0, 0.002, 0.01, 2.0)]
    assert oracle == sorted(oracle, reverse=True)


@pytest.mark.parametrize("target", [105.0, 115.0, 125.0, 139.0])
def test_search_keeps_to_the_gflops(train, val, target):
    best, rows = search_budget(train, val, 6, target_gflops=target)
    assert best.total_gflops <= target
    assert best.exact["pq"] == max(r.exact["pq"] for r in rows if r.total_gflops <= target)
    assert best.total_gflops > target - 2  # it uses the budget
    assert best.gate.beta == best.beta


@pytest.mark.parametrize("drop", [0.1, 1.0, 3.0])
def test_search_keeps_to_the_quality(train, val, drop):
    best, rows = search_budget(train, val, 6, max_pq_drop=drop)
    full = fixed_rows(val)[-1].score
    assert best.exact["pq"] >= full - drop
    assert best.total_gflops == min(r.total_gflops for r in rows if r.exact["pq"] >= full - drop)
    assert best.total_gflops < GFLOPS[6]


def test_generous_limits_end_the_search_at_once(train, val):
    best, rows = search_budget(train, val, 6, target_gflops=1e4)
    assert [r.policy for r in rows] == ["fixed"] * 3 + ["gate"] and rows[-1].beta == 0.0
    assert best is rows[2]  # as good as the gate
    best, rows = search_budget(train, val, 6, max_pq_drop=100.0)
    assert [r.policy for r in rows] == ["fixed"] * 3 + ["gate"] * 2 and best.images[2] == len(val)


def test_limits_that_cannot_be_kept_are_refused(train, val):
    with pytest.raises(ValueError, match="target_gflops 99.0 is below exit 2's 100"):
        search_budget(train, val, 6, target_gflops=99.0)
    with pytest.raises(ValueError, match=r"no gate or exit up to exit 2 loses at most 0.5 points: the least is \d"):
        search_budget(train, val, 2, max_pq_drop=0.5, steps=2)
    for limits in ({}, {"target_gflops": 110.0, "max_pq_drop": 1.0}):
        with pytest.raises(ValueError, match="give either"):
            search_budget(train, val, 6, **limits)
    for drop in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_pq_drop must be"):
            search_budget(train, val, 6, max_pq_drop=drop)


def test_datasets_of_another_parent_are_refused(train, tmp_path):
    other = make_derived(tmp_path / "other", 5, seed=2, parent_sha256="b" * 64)
    with pytest.raises(ValueError, match="parent_sha256 is aaa.* for training, bbb"):
        GateFitter(train, other)
    projected = make_derived(tmp_path / "projected", 5, seed=2, feature_source="projected")
    with pytest.raises(ValueError, match="feature_source is res5 for training, projected"):
        GateFitter(train, projected)
    bare = DerivedDataset.load(tmp_path / "other", with_features=False)
    with pytest.raises(ValueError, match="without features"):
        GateFitter(train, bare)


def test_qualities_that_differ_or_are_not_known_are_refused(train, tmp_path):
    """A gate fitted to mIoU is not evaluated by PQ."""
    miou = make_derived(tmp_path / "miou", 5, seed=2, measure="mIoU")
    for pair, first, second in (((train, miou), "PQ", "mIoU"), ((miou, train), "mIoU", "PQ")):
        with pytest.raises(ValueError, match=f"quality is {first} for training, {second} for validation: derive both"):
            GateFitter(*pair)
        with pytest.raises(ValueError, match=f"quality is {first} for training, {second}"):
            list(frontier(*pair, [0.1], [6]))
    unknown = make_derived(tmp_path / "unknown", 5, seed=2, measure="sharpness")
    for refused in (lambda: GateFitter(unknown, unknown), lambda: fixed_rows(unknown)):
        with pytest.raises(ValueError, match="quality 'sharpness' is not one of .*mIoU.*derive the dataset"):
            refused()


def test_rows_of_another_exact_quality_have_its_columns(tmp_path):
    """Each image finds a share q of its pixels, so the IoU is the mean share. `iou` is not read."""
    val = make_derived(tmp_path / "miou", 20, seed=2, measure="mIoU", pixels=1000)
    train = make_derived(tmp_path / "train", 60, seed=3, measure="mIoU", pixels=1000)
    choice = np.full(len(val), 4)
    row = measure(val, choice, policy="fixed", beta=None, max_exit=4, loss=None)
    assert list(row.exact) == ["miou"] and row.score == row.exact["miou"]
    assert row.score == pytest.approx(100 * val.quality[:, 1].mean(), abs=0.1)
    best, rows = search_budget(train, val, 6, max_pq_drop=1.0)
    assert best.gate.results["miou"] == best.score >= fixed_rows(val)[-1].score - 1.0
    assert "pq" not in best.gate.results and [list(r.exact) for r in rows] == [["miou"]] * len(rows)
    assert rows[-1].policy == "mixture" and rows[-1].score >= fixed_rows(val)[-1].score - 1.0
    assert "mIoU" in header(val) and "PQ" not in header(val)


def test_a_mean_over_images_has_no_columns_of_its_own(tmp_path):
    val = make_derived(tmp_path / "ap", 20, seed=2, with_statistics=False, measure="AP")
    row = fixed_rows(val)[0]
    assert row.exact == {} and row.score == row.quality == pytest.approx(100 * val.quality[:, 0].mean())
    write_csv(tmp_path / "ap.csv", [row.numbers()])
    head = (tmp_path / "ap.csv").read_text().splitlines()[0]
    assert head.startswith("policy,beta,max_exit,loss,quality,mean_exit,")
    named, line = header(val), format_row(row, val.quality_kind)
    assert line[named.index("quality") :].startswith(f"{row.quality:.2f}") and "PQ" not in named


def test_columns_stand_under_their_names(train, val):
    named, row = header(val), fixed_rows(val)[0]
    line = format_row(row, val.quality_kind)
    assert named.startswith("policy  K  beta     loss      PQ     PQ_th  PQ_st  quality  exit   GFLOPs    encoder")
    for title, column in (("PQ ", "pq"), ("PQ_th", "pq_things"), ("PQ_st", "pq_stuff")):
        assert line[named.index(title) :].startswith(f"{row.exact[column]:.2f} ")
    gate = GateFitter(train, val).fit(0.01, 6)
    line = format_row(gate, val.quality_kind)
    for title, value in (("gain", gate.gain.gain), ("from", gate.gain.low), ("to ", gate.gain.high)):
        assert line[named.rindex(title) :].startswith(f"{value:+.2f} ")
    assert line[named.rindex("p") :] == f"{gate.gain.p:.3f}" and len(line) < 140


def test_frontier_mistakes_show_before_the_first_row(train, val):
    with pytest.raises(ValueError, match="not 5"):
        next(frontier(train, val, [0.1], [5]))
    with pytest.raises(ValueError, match="beta must be"):
        next(frontier(train, val, [0.1, -1.0], [6]))


def test_without_statistics_the_mean_stands_in(tmp_path):
    train = make_derived(tmp_path / "train", 100, seed=0, with_statistics=False)
    val = make_derived(tmp_path / "val", 50, seed=1, with_statistics=False)
    best, _ = search_budget(train, val, 6, max_pq_drop=1.0)
    assert math.isnan(best.exact["pq"]) and best.score == best.quality >= fixed_rows(val)[-1].quality - 1.0
    line = format_row(best, val.quality_kind)
    assert "nan" not in line and f"{best.quality:.2f}" in line


def test_tables(train, val, tmp_path):
    rows = list(frontier(train, val, [0.005], [6]))
    write_csv(tmp_path / "out" / "frontier.csv", [row.numbers() for row in rows])
    with open(tmp_path / "out" / "frontier.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [r["policy"] for r in written] == ["fixed", "fixed", "fixed", "oracle", "gate", "mixture"]
    for row, line in ((row, line) for row, line in zip(rows, written) if row.policy in ("gate", "mixture")):
        assert float(line["pq"]) == row.exact["pq"] and int(line["images_exit4"]) == row.images[4]
        assert float(line["beta"]) == 0.005
        printed = format_row(row, val.quality_kind)
        assert f"{row.exact['pq']:.2f}" in printed and f"2:{row.images[2]} " in printed
    *_, gate, mixture = written
    assert written[0]["beta"] == "" == written[0]["gain"] == mixture["gain"] == gate["mixture_spread"]
    assert list(gate)[-6:] == ["mixture", "gain", "gain_low", "gain_high", "gain_p", "mixture_spread"]
    assert float(gate["mixture"]) == float(mixture["pq"]) and float(gate["gain"]) == rows[-2].gain.gain
    assert [float(gate[c]) for c in ("gain_low", "gain_high", "gain_p")] == [*vars(rows[-2].gain).values()][3:]
