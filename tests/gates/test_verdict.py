"""What a frontier and a search say, and what a search saves where a fixed exit or a mixture is best."""

import dataclasses

import pytest
from derived_by_depth import GFLOPS

from eco_m2f.gates.frontier import fixed_rows, frontier
from eco_m2f.gates.gate import Gate
from eco_m2f.gates.mixture import Gain, Mixture
from eco_m2f.gates.search import search_budget
from eco_m2f.gates.verdict import MOST_LINES, about, conclusion, verdict

USELESS = {"l2": 1e6}  # no weights: the gate sends all images to one exit


def test_a_gain_in_plain_words():
    mixture = Mixture((2, 3), 0.4)
    assert about(Gain(mixture, 50.0, 0.44, 0.1, 0.8, 0.01), "PQ") == (
        "+0.44 PQ over the mixture of exits 2 and 3 at equal cost (95 % interval 0.1 to 0.8, p 0.01)"
    )
    assert about(Gain(mixture, 50.0, 0.1, -0.2, 0.4, 0.23), "AP") == (
        "+0.10 AP over the mixture of exits 2 and 3 at equal cost: no gain is proven, "
        "the 95 % interval (-0.2 to 0.4) includes 0 (p 0.23)"
    )
    assert about(Gain(mixture, 50.0, -0.4, -0.6, -0.2, 0.99), "PQ").endswith(
        "at equal cost: it is worse (95 % interval -0.6 to -0.2, p 0.99)"
    )
    assert "over exit 6 for all, which costs no more" in about(Gain(Mixture((6, 6), 0.0), 50.0, 0, 0, 0, 1), "PQ")


def test_a_frontier_says_which_gates_beat_the_mixture(train, val):
    rows = list(frontier(train, val, [0.0, 0.01], [6, 4]))
    lines = verdict(rows, "PQ")
    assert lines[0].startswith("gate beta 0, K 6: +0.00 PQ over exit 6 for all") and "no gain is proven" in lines[0]
    assert lines[1].startswith("gate beta 0.01, K 6: +1.") and " (95 % interval 1" in lines[1]
    assert len(lines) == 5 and lines[-1] == "Each p is that of one gate; 4 gates were compared."
    lines = verdict(list(frontier(train, val, [0.01], [6], **USELESS)), "PQ")
    assert lines[0] == "No gate beats the mixture of fixed exits." and len(lines) == 2
    assert verdict(fixed_rows(val), "PQ") == []


def test_of_many_gates_the_best_are_named(train, val):
    row = next(row for row in frontier(train, val, [0.01], [6]) if row.policy == "gate")
    many = [dataclasses.replace(row, beta=0.001 * i) for i in range(1, 31)]
    lines = verdict(many, "PQ")
    assert len(lines) == MOST_LINES + 2 and lines[-2] == "30 of 30 gates beat the mixture of fixed exits."
    poor = dataclasses.replace(row.gain, low=-1.0)
    lines = verdict([dataclasses.replace(row, gain=poor) for row in many], "PQ")
    assert lines == ["No gate beats the mixture of fixed exits.", "0 of 30 gates beat the mixture of fixed exits."]


@pytest.mark.parametrize("limit", [{"target_gflops": 118.0}, {"max_pq_drop": 0.5}])
def test_a_gate_that_wins_is_said_to(train, val, limit):
    saved, rows = search_budget(train, val, 6, **limit)
    first, second = conclusion(saved, rows, "target_gflops" in limit, "PQ")
    assert first.startswith(
        f"Best: gate beta {saved.beta:.3g}, {saved.score:.2f} PQ at {saved.total_gflops:.4g} GFLOPs"
    )
    assert "; the mixture of fixed exits: " in first and "over the mixture of exits" in second


@pytest.mark.parametrize(
    "limit, exit", [({"target_gflops": 1e4}, 6), ({"max_pq_drop": 100.0}, 2), ({"target_gflops": 100.0}, 2)]
)
def test_a_fixed_exit_that_wins_is_said_to_and_saved(train, val, tmp_path, limit, exit):
    saved, rows = search_budget(train, val, 6, **limit)
    assert saved.policy == "fixed" and saved.max_exit == exit
    points = f"{saved.score:.2f} PQ at {GFLOPS[exit]:.4g} GFLOPs"
    assert conclusion(saved, rows, "target_gflops" in limit, "PQ") == [
        f"Best: fixed exit {exit}, {points}. No gate is better. The file sends every image to exit {exit}."
    ]
    saved.gate.save(tmp_path / "gate.safetensors")
    import torch

    gate = Gate.load(tmp_path / "gate.safetensors")
    assert set(gate.choose(torch.from_numpy(val.features)).tolist()) == {exit} and gate.max_exit == exit
    assert not gate.weight.any() and gate.fit == {"fixed_exit": exit}
    assert gate.results["pq"] == saved.exact["pq"] and gate.results["policy"] == "fixed"


@pytest.mark.parametrize(
    "limit, exits, exit", [({"target_gflops": 118.0}, (2, 4), 2), ({"max_pq_drop": 0.5}, (4, 6), 6)]
)
def test_a_mixture_that_wins_is_said_to_and_the_next_best_is_saved(train, val, limit, exits, exit):
    saved, rows = search_budget(train, val, 6, steps=3, **USELESS, **limit)
    mixture = rows[-1]
    assert mixture.policy == "mixture" and saved.policy == "fixed" and saved.max_exit == exit
    first, second = conclusion(saved, rows, "target_gflops" in limit, "PQ")
    assert first.startswith(f"Best: mixture of exits {exits[0]} and {exits[1]}, ")
    assert first.endswith(
        f"at random: {mixture.score:.2f} PQ at {mixture.total_gflops:.4g} GFLOPs. A gate file cannot hold a mixture."
    )
    assert second.startswith(f"Saved is the best of gates and fixed exits: fixed exit {exit}, {saved.score:.2f} PQ")
    if "target_gflops" in limit:
        assert mixture.total_gflops == pytest.approx(118.0) and mixture.score > saved.score
    else:
        assert mixture.score >= fixed_rows(val)[-1].score - 0.5 and mixture.total_gflops < saved.total_gflops


def test_the_search_goes_no_deeper_than_k(train, val):
    saved, rows = search_budget(train, val, 4, target_gflops=1e4)
    assert max(max(k for k, n in row.images.items() if n) for row in rows) == 4
    assert saved.max_exit == 4 and saved.policy == "fixed"
