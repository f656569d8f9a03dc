"""Fitting a gate: it finds the optimum, and refuses a loss without one."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad

from eco_m2f.exits import GATE_LOSSES, UNBOUNDED_LOSSES, exit_targets, gate_loss, largest_beta, utility
from eco_m2f.gates import fit as gate_fit
from eco_m2f.gates.fit import OPTIMIZERS, AdamOptions, Scaling, fit_gate, fit_gates

EXITS = (2, 3, 4, 5, 6)
SOURCE = {"feature_source": "res5", "parent_sha256": "f" * 64}


def make_data(n=500, channels=6, seed=0):
    """Badly scaled, correlated features whose direction gives the best exit, with noise."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, channels))
    best = 2 + np.clip(np.round(2 + 1.5 * z[:, 0]), 0, 4)
    quality = 0.6 - 0.02 * (np.array(EXITS) - best[:, None]) ** 2 + 0.002 * rng.normal(size=(n, 5))
    mixing = np.random.default_rng(1).normal(size=(channels, channels)) * 10.0 ** np.arange(-2, channels - 2)
    return (z @ mixing + 5.0).astype(np.float32), quality.clip(0, 1)


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
def test_the_gradient_is_that_of_the_loss(loss):
    """Against finite differences, in float64 and in the coordinates of `Scaling`."""
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
        return gate_fit._objectives(features, [(loss, utilities)], scaling, 0.1, {0: flat})[0][1]

    at = np.random.default_rng(0).normal(size=25) * 0.3
    ours, _ = gate_fit._objectives(features.float(), [(loss, utilities)], scaling, 0.1, {0: at})[0]
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
    monkeypatch.setattr(gate_fit, "_SAMPLE", 1000)
    monkeypatch.setattr(gate_fit, "_ROWS", 128)
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
    """Gates of several widths and losses, in groups of two, which end after different numbers of evaluations."""
    features, quality = make_data(n=400)
    budgets = [(0.0, 6, "hard_ce"), (0.001, 4, "soft_ce"), (3.0, 2, "u_ce"), (0.01, 5, "soft_mse"), (0.01, 6, "u_ce")]
    monkeypatch.setattr(gate_fit, "_SIDE_BY_SIDE", 2)
    together = fit_gates(features, quality, EXITS, budgets, **SOURCE)
    for gate, (beta, max_exit, loss) in zip(together, budgets):
        alone = fit_gate(features, quality, EXITS, beta, max_exit, loss, **SOURCE)
        assert (gate.beta, gate.max_exit, gate.loss) == (beta, max_exit, loss)
        torch.testing.assert_close(gate.weight, alone.weight, atol=1e-3, rtol=1e-2)
        assert gate.fit["train_loss"] == pytest.approx(alone.fit["train_loss"], rel=1e-5)


def test_l2_shrinks_and_guards_small_datasets():
    rng = np.random.default_rng(0)
    features, quality = rng.normal(size=(30, 64)).astype(np.float32), rng.uniform(size=(30, 5))
    free = fit_gate(features, quality, EXITS, 0.0, 6, l2=1e-6, **SOURCE)
    default = fit_gate(features, quality, EXITS, 0.0, 6, **SOURCE)
    assert default.fit["l2"] == pytest.approx(64 / 30)
    assert default.weight.norm() < 0.1 * free.weight.norm()
    assert free.fit["train_loss"] < 0.05  # learnt by heart: what the penalty is for


@pytest.mark.parametrize("loss", sorted(set(GATE_LOSSES) - set(UNBOUNDED_LOSSES)))
def test_beta_beyond_every_gain_sends_all_to_the_first_exit(loss):
    features, quality = make_data(n=300)
    gate = fit_gate(features, quality, EXITS, 3.0, 6, loss, **SOURCE)
    assert gate.choose(torch.from_numpy(features)).unique().tolist() == [2]


def low_quality(n=300, channels=6):
    """Qualities so low that a beta of 0.01 makes most utilities negative."""
    features, quality = make_data(n, channels)
    return features, quality * 0.05


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_low_utilities_are_fitted_or_refused_with_a_remedy(loss, optimizer):
    features, quality = low_quality()
    few = AdamOptions(iterations=60)
    assert (utility(quality, EXITS, 0.01).mean(dim=0) < 0).any()
    if loss not in UNBOUNDED_LOSSES:
        gate = fit_gate(features, quality, EXITS, 0.01, 6, loss, optimizer=optimizer, adam=few, **SOURCE)
        start = gate_loss(loss, torch.zeros(300, 5), utility(quality, EXITS, 0.01)).item()
        assert 0 <= gate.fit["train_loss"] <= start + 1e-3 and gate.weight.abs().max() < 1e3
        return
    with pytest.raises(
        ValueError, match=r"no minimum at beta 0.01 and K 6.* Take a beta of at most [\d.e-]+, or another"
    ):
        fit_gate(features, quality, EXITS, 0.01, 6, loss, optimizer=optimizer, **SOURCE)
    largest = largest_beta(loss, quality, EXITS, 6)
    fit_gate(features, quality, EXITS, 0.9 * largest, 6, loss, optimizer=optimizer, adam=few, l2=0.1, **SOURCE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_negative_utilities_of_some_images_alone_run_away_without_a_penalty(optimizer):
    """The mean utilities are positive, but the features separate the images with negative utilities."""
    z = np.tile([[1.0], [-1.0]], (150, 1)).astype(np.float32)
    quality = np.where(z > 0, [0.1, 0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9, 0.9])
    steps = {"adam": AdamOptions(lr=1.0, iterations=100)}
    assert (utility(quality, EXITS, 0.05).mean(dim=0) > 0).all()
    with pytest.raises(ValueError, match="the fit of beta 0.05, K 6, loss u_ce diverged: .*smaller beta or another"):
        fit_gate(z, quality, EXITS, 0.05, 6, "u_ce", optimizer=optimizer, l2=0.0, **steps, **SOURCE)
    sound = fit_gate(z, quality, EXITS, 0.05, 6, "u_ce", l2=1.0, **SOURCE)
    assert sound.fit["train_loss"] > -10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_beta_beyond_numbers_is_refused_with_the_remedy(optimizer):
    features, quality = make_data(n=300)
    with pytest.raises(ValueError, match="diverged: beta times .* Take a smaller beta"):
        fit_gate(features, quality, EXITS, 1.7e308, 6, "soft_ce", optimizer=optimizer, **SOURCE)


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
def test_a_rate_at_which_adam_diverges_is_refused(loss):
    features, quality = make_data(n=300)
    wild = AdamOptions(lr=1e30, iterations=20)
    with pytest.raises(ValueError, match="diverged.*Lower Adam's rate|not finite.*lower the learning rate"):
        fit_gate(features, quality, EXITS, 0.001, 6, loss, optimizer="adam", adam=wild, **SOURCE)


@pytest.mark.parametrize("loss", sorted(GATE_LOSSES))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sound_fit_is_never_taken_for_one_that_ran_away(loss, optimizer):
    """Noise without a signal; separable features with almost no penalty."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 8)).astype(np.float32)
    flat = 0.5 + 1e-4 * rng.normal(size=(100, 5))
    few = AdamOptions(iterations=60)
    fit_gate(noise, flat, EXITS, 0.0005, 6, loss, optimizer=optimizer, adam=few, **SOURCE)
    separable = np.eye(5)[np.argmax(flat, axis=1)].astype(np.float32)
    fit_gate(separable, flat, EXITS, 0.0, 6, loss, optimizer=optimizer, adam=few, l2=1e-9, **SOURCE)


def test_adam_takes_as_many_steps_as_it_is_told(monkeypatch):
    features, quality = make_data(n=100)
    counted = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: counted.append(self.param_groups[0]["lr"]) or original(self, *a)
    )
    for options, steps in [(AdamOptions(0.5, 30, epochs=2), 8), (AdamOptions(0.5, 30, iterations=5), 5)]:
        counted.clear()
        gate = fit_gate(features, quality, EXITS, 0.001, 6, optimizer="adam", adam=options, **SOURCE)
        assert len(counted) == steps and counted[0] == 0.5 and counted[-1] < 0.1
        assert (gate.fit["lr"], gate.fit["batch"], gate.fit["iterations"]) == (0.5, 30, steps)
    assert AdamOptions().steps(100) == 768 and AdamOptions().steps(100_000) == 3910  # 10 epochs, 300 steps at least


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"lr": math.nan}, {"batch": 0}, {"epochs": -1}, {"epochs": 1, "iterations": 1}]
)
def test_options_of_adam_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="Adam"):
        AdamOptions(**options)


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
