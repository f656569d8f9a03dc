"""The paper's equations about exits, against sums written out by hand."""

import math

import pytest
import torch

from eco_m2f.exits import (
    GATE_LOSSES,
    ExitSampler,
    combine_exit_losses,
    exit_targets,
    exit_weights,
    exits_up_to,
    gate_loss,
    utility,
)

EXITS = (2, 3, 4, 5, 6)


def random_quality(n=300, seed=0, levels=None):
    """Qualities [n, 5] in [0, 1]. With few levels many of them tie, as in real images."""
    quality = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return quality if levels is None else (quality * levels).floor() / levels


def test_eq3_weights_linear_uniform_and_explicit():
    assert exit_weights("linear", EXITS, 6) == {k: k / 6 for k in EXITS}
    assert exit_weights("linear", [6], 6) == {6: 1.0}
    assert exit_weights("uniform", EXITS, 6) == dict.fromkeys(EXITS, 1.0)
    assert exit_weights([0.1, 0.2, 0.4, 0.8, 1.6], EXITS, 6)[5] == 0.8


@pytest.mark.parametrize("alpha", [[1, 1, 1, 1, 1], [5, 4, 3, 2, 1], [0, 1, 2, 3, 4], [1, 2, 3, 4, math.nan]])
def test_eq3_weights_that_do_not_increase_are_refused(alpha):
    with pytest.raises(ValueError, match="strictly increase"):
        exit_weights(alpha, EXITS, 6)


def test_eq3_weights_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="3 weights for 5 exits"):
        exit_weights([1, 2, 3], EXITS, 6)
    with pytest.raises(ValueError, match="unknown alpha 'quadratic'"):
        exit_weights("quadratic", EXITS, 6)
    with pytest.raises(ValueError, match="beyond the encoder's 5 layers"):
        exit_weights("linear", EXITS, 5)
    for exits in ([], [0, 1], [3, 2], [2, 2], [2.5]):
        with pytest.raises(ValueError, match="increasing order"):
            exit_weights("linear", exits, 6)


def test_eq3_all_exits_every_step_is_exact():
    weights = exit_weights("linear", EXITS, 6)
    sampler = ExitSampler(EXITS, weights, exits_per_step=5, seed=3)
    assert all(sampler(i) == weights for i in range(20))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_eq3_sampled_exits_have_the_same_expectation(n):
    weights = exit_weights("linear", EXITS, 6)
    sampler = ExitSampler(EXITS, weights, exits_per_step=n, seed=1)
    steps = 4000
    total = dict.fromkeys(EXITS, 0.0)
    for iteration in range(steps):
        drawn = sampler(iteration)
        assert len(drawn) == n and list(drawn) == sorted(drawn)
        for k, weight in drawn.items():
            assert weight == pytest.approx(weights[k] * 5 / n, rel=1e-15)
            total[k] += weight / steps
    for k in EXITS:
        spread = weights[k] * math.sqrt((5 / n - 1) / steps)  # standard error of the mean
        assert abs(total[k] - weights[k]) < 4 * spread


def test_eq3_draw_depends_on_seed_and_iteration_alone():
    weights = exit_weights("uniform", EXITS, 6)
    draws = [ExitSampler(EXITS, weights, 2, seed=5)(i) for i in range(50)]
    resumed = ExitSampler(EXITS, weights, 2, seed=5)
    assert [resumed(i) for i in reversed(range(50))] == draws[::-1]
    assert [ExitSampler(EXITS, weights, 2, seed=6)(i) for i in range(50)] != draws
    assert len({tuple(d) for d in draws}) > 5


def test_eq3_sampler_mistakes_are_refused():
    weights = exit_weights("linear", EXITS, 6)
    for n in (0, 6):
        with pytest.raises(ValueError, match=rf"1\.\.5.*{n}"):
            ExitSampler(EXITS, weights, n)
    with pytest.raises(ValueError, match="weights are given for exits"):
        ExitSampler((5, 6), weights, 1)
    with pytest.raises(ValueError, match="seed"):
        ExitSampler(EXITS, weights, 1, seed=-1)


def test_eq3_combined_losses_are_named_and_weighted():
    losses = {k: {"loss_ce": torch.tensor(1.0 * k), "loss_mask_3": torch.tensor(10.0 * k)} for k in (2, 6)}
    combined = combine_exit_losses(losses, {2: 0.5, 6: 2.0}, last_exit=6)
    assert {name: value.item() for name, value in combined.items()} == {
        "exit2/loss_ce": 1.0,
        "exit2/loss_mask_3": 10.0,
        "loss_ce": 12.0,
        "loss_mask_3": 120.0,
    }


def test_eq3_combined_losses_without_the_last_exit_lack_the_official_names():
    losses = {k: {"loss_ce": torch.tensor(1.0)} for k in (2, 5)}
    assert set(combine_exit_losses(losses, {2: 1.0, 5: 1.0}, last_exit=6)) == {"exit2/loss_ce", "exit5/loss_ce"}


def test_eq3_combined_losses_mistakes_are_refused():
    losses = {6: {"loss_ce": torch.tensor(1.0)}}
    with pytest.raises(ValueError, match="weights for"):
        combine_exit_losses(losses, {5: 1.0, 6: 1.0}, last_exit=6)
    with pytest.raises(ValueError, match="beyond the last configured exit 5"):
        combine_exit_losses(losses, {6: 1.0}, last_exit=5)


def test_eq4_utility():
    quality = random_quality()
    u = utility(quality, EXITS, beta=0.003)
    for j, k in enumerate(EXITS):
        assert torch.equal(u[:, j], quality[:, j] - 0.003 * k)


def test_eq4_utility_with_measured_costs():
    quality = random_quality(n=4)
    gflops = torch.tensor([110.0, 120, 130, 140, 150], dtype=torch.float64)
    assert torch.equal(utility(quality, EXITS, 1e-3, gflops), quality - 1e-3 * gflops)
    per_image = gflops * torch.tensor([[1.0], [2.0], [1.0], [0.5]])
    assert torch.equal(utility(quality, EXITS, 1e-3, per_image), quality - 1e-3 * per_image)


@pytest.mark.parametrize("beta", [-1e-9, math.nan, math.inf])
def test_eq4_bad_beta_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta must be a finite number >= 0, not {beta}"):
        utility(random_quality(), EXITS, beta)


def test_eq4_bad_quality_and_shapes_are_refused():
    quality = random_quality(n=3)
    quality[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"quality must be finite, but is nan at index \[2, 1\]"):
        utility(quality, EXITS, 0.1)
    with pytest.raises(ValueError, match=r"must be \[N, 5\]"):
        utility(random_quality()[:, :3], EXITS, 0.1)
    with pytest.raises(ValueError, match="costs must be"):
        utility(random_quality(n=3), EXITS, 0.1, costs=[1.0, 2.0])


@pytest.mark.parametrize("levels", [None, 4, 20])
@pytest.mark.parametrize("max_exit", EXITS)
@pytest.mark.parametrize("beta", [0.0, 0.0005, 0.003, 0.05])
def test_eq5_target(levels, max_exit, beta):
    quality = random_quality(levels=levels)
    targets = exit_targets(quality, EXITS, beta, max_exit)
    for q, t in zip(quality.tolist(), targets.tolist()):
        u = {k: q_k - beta * k for k, q_k in zip(EXITS, q) if k <= max_exit}
        assert t == min(k for k in u if u[k] == max(u.values()))


def test_eq5_ties_go_to_the_smaller_exit():
    assert exit_targets(torch.zeros(7, 5), EXITS, 0.0, 6).tolist() == [2] * 7
    assert exit_targets([[0.0, 0.5, 0.1, 0.5, 0.5]], EXITS, 0.0, 6).tolist() == [3]


def test_eq5_beta_zero_is_the_best_quality():
    quality = random_quality()
    assert torch.equal(exit_targets(quality, EXITS, 0.0, 6), quality.argmax(dim=1) + 2)


def test_eq5_large_beta_is_the_first_exit():
    assert set(exit_targets(random_quality(), EXITS, 1e6, 6).tolist()) == {2}


@pytest.mark.parametrize("levels", [None, 10])
def test_eq5_raising_beta_never_raises_a_target(levels):
    quality = random_quality(n=2000, levels=levels)
    previous = exit_targets(quality, EXITS, 0.0, 6)
    for beta in torch.logspace(-5, 0.5, 60).tolist():
        targets = exit_targets(quality, EXITS, beta, 6)
        assert (targets <= previous).all()
        previous = targets
    assert (previous == 2).all()


def test_eq5_lowering_max_exit_never_raises_a_target_above_it():
    quality = random_quality(n=2000)
    for beta in (0.0, 0.01, 0.1):
        whole = exit_targets(quality, EXITS, beta, 6)
        for max_exit in EXITS:
            targets = exit_targets(quality, EXITS, beta, max_exit)
            assert targets.max() <= max_exit
            assert torch.equal(targets[whole <= max_exit], whole[whole <= max_exit])


def test_eq5_max_exit_outside_the_exits_is_refused():
    for max_exit in (1, 7):
        with pytest.raises(ValueError, match=f"not {max_exit}"):
            exit_targets(random_quality(), EXITS, 0.1, max_exit)
    assert exits_up_to(EXITS, 4) == (2, 3, 4)


def by_hand(name, logits, u):
    """Table T2 for one image, in plain floats."""

    def softmax(x):
        e = [math.exp(v) for v in x]
        return [v / sum(e) for v in e]

    p, s = softmax(logits), softmax(u)
    return {
        "hard_ce": -math.log(p[u.index(max(u))]),
        "u_ce": -sum(a * math.log(b) for a, b in zip(u, p)),
        "soft_ce": -sum(a * math.log(b) for a, b in zip(s, p)),
        "soft_mse": sum((a - b) ** 2 for a, b in zip(s, p)),
    }[name]


@pytest.mark.parametrize("name", sorted(GATE_LOSSES))
def test_table_t2_losses(name):
    logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = utility(random_quality(n=16), EXITS, beta=0.3)  # some utilities are negative
    assert (u < 0).any()
    expected = sum(by_hand(name, g, v) for g, v in zip(logits.tolist(), u.tolist())) / 16
    assert gate_loss(name, logits, u).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["hard_ce", "soft_ce", "soft_mse"])
def test_table_t2_losses_pull_towards_the_utility(name):
    u = torch.tensor([[0.1, 0.9, 0.3]])
    good, bad = torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[0.9, 0.1, 0.3]])
    assert gate_loss(name, good, u) < gate_loss(name, bad, u)


def test_table_t2_hard_ce_breaks_ties_as_eq5():
    """Utilities that differ only beyond float32 must give the exit of `exit_targets`."""
    u = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    logits = torch.tensor([[0.0, 5.0]])
    assert gate_loss("hard_ce", logits, u).item() == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-4)


def test_table_t2_mistakes_are_refused():
    with pytest.raises(ValueError, match="unknown gate loss 'mse'"):
        gate_loss("mse", torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="must both be"):
        gate_loss("hard_ce", torch.zeros(1, 5), torch.zeros(1, 4))
