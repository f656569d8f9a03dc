"""The gate's file, and that fitting finds what it should."""

import math
import threading

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad

from eco_m2f import gate as gate_module
from eco_m2f.exits import GATE_LOSSES, exit_targets, gate_loss, utility
from eco_m2f.gate import OPTIMIZERS, Gate, Scaling, fit_gate, fit_gates

EXITS = (2, 3, 4, 5, 6)
SOURCE = {"feature_source": "res5", "parent_sha256": "f" * 64}


def make_data(n=500, channels=6, seed=0):
    """Badly scaled, correlated features, from whose direction the best exit can be told, with noise."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, channels))
    best = 2 + np.clip(np.round(2 + 1.5 * z[:, 0]), 0, 4)
    quality = 0.6 - 0.02 * (np.array(EXITS) - best[:, None]) ** 2 + 0.002 * rng.normal(size=(n, 5))
    mixing = np.random.default_rng(1).normal(size=(channels, channels)) * 10.0 ** np.arange(-2, channels - 2)
    return (z @ mixing + 5.0).astype(np.float32), quality.clip(0, 1)


def small_gate(**changes):
    options = {
        "weight": torch.arange(6.0).view(3, 2),
        "bias": torch.zeros(3),
        "exits": (2, 4, 6),
        "beta": 0.0005,
        "loss": "hard_ce",
        **SOURCE,
    }
    return Gate(**{**options, **changes})


def test_a_gate_is_read_as_it_was_saved(tmp_path):
    gate = small_gate(fit={"optimizer": "lbfgs", "seed": 3}, results={"pq": 51.5, "loss": "hard_ce"})
    gate.save(tmp_path / "deep" / "gate.pth")
    loaded = Gate.load(tmp_path / "deep" / "gate.pth")
    assert torch.equal(loaded.weight, gate.weight) and torch.equal(loaded.bias, gate.bias)
    for name in ("exits", "max_exit", "beta", "loss", "feature_source", "parent_sha256", "fit", "results"):
        assert getattr(loaded, name) == getattr(gate, name)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["gate.pth"]


def test_a_gate_chooses_the_largest_logit_and_the_smaller_exit_of_equals():
    gate = small_gate(weight=torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
    assert gate.choose(torch.tensor([[2.0, 1], [1, 2], [1, 1]])).tolist() == [2, 4, 2]
    assert torch.equal(gate.logits(torch.tensor([[2.0, 1]])), torch.tensor([[2.0, 1, 1]]))


def test_what_is_no_gate_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tools/train_gate.py"):
        Gate.load(tmp_path / "none.pth")
    torch.save({"model": {}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="is not a gate file"):
        Gate.load(tmp_path / "model.pth")
    for changes, message in [
        ({"weight": torch.zeros(2, 2)}, "needs weight"),
        ({"bias": torch.zeros(2)}, "needs weight"),
        ({"bias": torch.tensor([0, math.nan, 0])}, "not finite"),
        ({"exits": (6, 4, 2)}, "increasing order"),
        ({"beta": -1.0}, "beta must be"),
        ({"loss": "mse"}, "unknown gate loss 'mse'"),
    ]:
        with pytest.raises(ValueError, match=message):
            small_gate(**changes)


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
def test_the_gradient_is_that_of_the_loss(loss):
    """In float64 and in the whitened coordinates, against finite differences."""
    features, quality = make_data(n=40, channels=4)
    features = torch.from_numpy(features).double()
    utilities = utility(quality, EXITS, 0.01)
    scaling = Scaling.of(features, l2=0.1)
    assert scaling.root.shape == (4, 4)

    def value(flat):
        v, bias = torch.from_numpy(flat).view(5, 5).split([4, 1], dim=1)
        weight, bias = scaling.fold(v, bias[:, 0])
        penalty = 0.05 * (weight * scaling.std).square().sum()
        return (gate_loss(loss, features @ weight.T + bias, utilities) + penalty).item()

    def gradient(flat):
        return gate_module._objectives(features, [(loss, utilities)], scaling, 0.1, {0: flat})[0][1]

    at = np.random.default_rng(0).normal(size=25) * 0.3
    ours, _ = gate_module._objectives(features.float(), [(loss, utilities)], scaling, 0.1, {0: at})[0]
    assert ours == pytest.approx(value(at), rel=1e-5)
    assert check_grad(value, gradient, at) < 1e-5 * max(1.0, np.linalg.norm(gradient(at)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_exit", [6, 4])
def test_a_fitted_gate_generalises(optimizer, max_exit):
    features, quality = make_data(n=1500)
    other_features, other_quality = make_data(n=1000, seed=5)
    gate = fit_gate(features, quality, EXITS, 0.001, max_exit, optimizer=optimizer, **SOURCE)
    choice = gate.choose(torch.from_numpy(other_features))
    targets = exit_targets(other_quality, EXITS, 0.001, max_exit)
    most_frequent = targets.bincount().max().item() / len(targets)  # what a constant gate reaches
    agreement = (choice == targets).float().mean().item()
    assert agreement > most_frequent + 0.05
    assert gate.exits == EXITS[: max_exit - 1] and gate.fit["optimizer"] == optimizer


def test_lbfgs_reaches_a_loss_that_adam_does_not_beat():
    features, quality = make_data(n=500)
    losses = {
        o: fit_gate(features, quality, EXITS, 0.001, 6, optimizer=o, l2=1e-4, **SOURCE).fit["train_loss"]
        for o in OPTIMIZERS
    }
    assert losses["lbfgs"] <= losses["adam"]


def test_fits_larger_than_the_sample_come_to_the_same_optimum(monkeypatch):
    features, quality = make_data(n=3000)
    whole = fit_gate(features, quality, EXITS, 0.001, 6, l2=0.01, **SOURCE)
    monkeypatch.setattr(gate_module, "_SAMPLE", 1000)
    monkeypatch.setattr(gate_module, "_ROWS", 128)
    staged = fit_gate(features, quality, EXITS, 0.001, 6, l2=0.01, **SOURCE)
    assert staged.fit["train_loss"] == pytest.approx(whole.fit["train_loss"], rel=2e-3)
    z = torch.from_numpy(features)
    assert (staged.choose(z) == whole.choose(z)).float().mean() > 0.95


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_seed_gives_the_same_gate(optimizer):
    features, quality = make_data(n=300)
    one, two = (fit_gate(features, quality, EXITS, 0.001, 6, optimizer=optimizer, seed=4, **SOURCE) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_gates_fitted_side_by_side_are_those_fitted_alone(monkeypatch):
    """Gates of several widths and losses, in groups of two, that end after different numbers of evaluations."""
    features, quality = make_data(n=400)
    budgets = [(0.0, 6, "hard_ce"), (0.001, 4, "soft_ce"), (3.0, 2, "u_ce"), (0.01, 5, "soft_mse"), (0.01, 6, "u_ce")]
    monkeypatch.setattr(gate_module, "_SIDE_BY_SIDE", 2)
    together = fit_gates(features, quality, EXITS, budgets, **SOURCE)
    for gate, (beta, max_exit, loss) in zip(together, budgets):
        alone = fit_gate(features, quality, EXITS, beta, max_exit, loss, **SOURCE)
        assert (gate.beta, gate.max_exit, gate.loss) == (beta, max_exit, loss)
        torch.testing.assert_close(gate.weight, alone.weight, atol=1e-3, rtol=1e-2)
        assert gate.fit["train_loss"] == pytest.approx(alone.fit["train_loss"], rel=1e-5)


def test_a_failing_evaluation_ends_every_minimisation():
    def fail(points):
        raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        gate_module._minimise_side_by_side(fail, [np.zeros(3)] * 4, {})
    for thread in threading.enumerate():
        if thread.daemon and "minimise_one" in thread.name:
            thread.join(5)
    assert threading.active_count() <= before


def test_l2_shrinks_and_guards_small_datasets():
    rng = np.random.default_rng(0)
    features, quality = rng.normal(size=(30, 64)).astype(np.float32), rng.uniform(size=(30, 5))
    free = fit_gate(features, quality, EXITS, 0.0, 6, l2=1e-6, **SOURCE)
    default = fit_gate(features, quality, EXITS, 0.0, 6, **SOURCE)
    assert default.fit["l2"] == pytest.approx(64 / 30)
    assert default.weight.norm() < 0.1 * free.weight.norm()
    assert free.fit["train_loss"] < 0.05  # learnt by heart: what the penalty is for


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
def test_beta_beyond_every_gain_sends_all_to_the_first_exit(loss):
    features, quality = make_data(n=300)
    gate = fit_gate(features, quality, EXITS, 3.0, 6, loss, **SOURCE)
    assert gate.choose(torch.from_numpy(features)).unique().tolist() == [2]


def test_constant_features_do_no_harm():
    features, quality = make_data(n=200)
    features[:, 2] = 7.25
    gate = fit_gate(features, quality, EXITS, 0.001, 6, **SOURCE)
    assert gate.weight.isfinite().all() and gate.weight[:, 2].abs().max() < 1e-3


def test_arguments_that_do_not_fit_are_refused():
    features, quality = make_data(n=20)
    for changes, message in [
        ({"features": features[:10]}, r"must be \[20, C\]"),
        ({"max_exit": 7}, "not 7"),
        ({"beta": math.nan}, "beta must be"),
        ({"loss": "mse"}, "unknown gate loss"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"l2": -1.0}, "l2 must be"),
        ({"features": np.full_like(features, np.nan)}, "not finite"),
    ]:
        options = {"features": features, "quality": quality, "exits": EXITS, "beta": 0.1, "max_exit": 6, **changes}
        with pytest.raises(ValueError, match=message):
            fit_gate(**options, **SOURCE)
