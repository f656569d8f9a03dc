"""The mixture of fixed exits, and the gain over it: against brute force, a closed form and a simulated truth."""

import math

import numpy as np
import pytest
from derived_at_random import EXITS as RANDOM_EXITS
from derived_at_random import write
from derived_by_depth import EXITS, GFLOPS, make_derived

from eco_m2f.derived.counted import CountedQuality
from eco_m2f.derived.dataset import DerivedDataset, _SparseStatistics
from eco_m2f.exits import exit_targets
from eco_m2f.gates.mixture import Mixture, Mixtures, upper_hull
from eco_m2f.quality import quality_named


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    """Of a quality that is no sum."""
    return make_derived(tmp_path_factory.mktemp("ap"), 120, seed=1, with_statistics=False, measure="AP")


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Images at random, each of another cost, with several categories."""
    folder = tmp_path_factory.mktemp("random")
    write(folder)
    return DerivedDataset.load(folder)


def simulated(rng, number: int, effect: float) -> tuple[DerivedDataset, np.ndarray]:
    """Images of noisy quality at two exits, and a choice of exits by a sign that tells what depth brings.

    Of all images that there are, the choice gains 100 * effect * E|z| points over the mixture of its cost.
    """
    z = rng.normal(size=number)
    gain = 0.1 + 2 * effect * z + 0.1 * rng.normal(size=number)
    first = 0.4 + 0.05 * rng.normal(size=number)
    cost = np.tile([10.0, 20.0], (number, 1)) * rng.uniform(0.8, 1.2, number)[:, None]
    names = [str(i) for i in range(number)]
    provenance = {"exits": [2, 6], "measure": "AP", "dataset": "simulated", "categories": []}
    quality = np.stack([first, first + gain], axis=1)
    statistics = _SparseStatistics(2, np.zeros(2 * number + 1, np.int64), *[np.zeros(0)] * 5)
    dataset = DerivedDataset(provenance, names, names, np.ones((number, 2)), quality, None, cost, cost, statistics)
    return dataset, np.where(z > 0, 6, 2)


def test_the_hull_has_what_no_mixture_of_others_reaches():
    assert upper_hull([1, 2, 3, 4], [0, 3, 4, 4.5]) == [0, 1, 2, 3]
    assert upper_hull([1, 2, 3, 4], [0, 1, 4, 3]) == [0, 2]  # 1 lies below the line, 3 costs more and is worse
    assert upper_hull([1, 2, 3], [5, 4, 4]) == [0]
    assert upper_hull([3, 1, 2], [2, 0, 1]) in ([1, 0], [1, 2, 0])  # on one line
    assert upper_hull([1, 1, 2], [0, 1, 2]) == [1, 2]


def test_a_mixture_at_the_cost_of_a_fixed_exit_is_that_exit(val, means):
    for dataset in (val, means):
        mixtures = Mixtures(dataset)
        for exit in EXITS:
            mixture = mixtures.at(GFLOPS[exit])
            row, choice = mixtures.row(mixture), np.full(len(dataset), exit)
            assert mixture == Mixture((exit, exit), 0.0) and str(mixture) == f"exit {exit} for all"
            assert row["total_gflops"] == GFLOPS[exit] and row["images"] == {k: 120 * (k == exit) for k in EXITS}
            assert row["score"] == pytest.approx(mixtures._score(choice), abs=1e-12) and row["spread"] == 0
            gain = mixtures.gain(choice)
            assert (gain.gain, gain.low, gain.high, gain.p) == (0, 0, 0, 1)


def test_costs_beyond_the_hull_are_those_of_its_ends(val):
    mixtures = Mixtures(val)
    assert mixtures.at(1.0) == Mixture((2, 2), 0.0) and mixtures.at(1e9) == Mixture((6, 6), 0.0)
    assert Mixtures(val, max_exit=4).at(1e9) == Mixture((4, 4), 0.0)


def test_between_two_exits_cost_and_an_additive_quality_are_linear(val, means):
    for dataset, tolerance in ((means, 1e-9), (val, 0.03)):
        mixtures = Mixtures(dataset)
        for share in (0.1, 0.5, 0.95):
            row = mixtures.row(Mixture((2, 4), share))
            ends = [mixtures._score(np.full(len(dataset), k)) for k in (2, 4)]
            assert row["total_gflops"] == pytest.approx((1 - share) * GFLOPS[2] + share * GFLOPS[4])
            assert mixtures.at(row["total_gflops"]).share == pytest.approx(share)
            assert row["score"] == pytest.approx((1 - share) * ends[0] + share * ends[1], abs=tolerance)
            assert sum(row["images"].values()) == 120 and row["images"][4] == round(120 * share)


def test_draws_equal_brute_force(random):
    """Each draw is measured as a choice of exits is; every image is as likely as another to go deeper."""
    mixtures, share = Mixtures(random, draws=300), 0.37
    deeper = mixtures._parts(Mixture((2, 6), share))[1][1]  # [draws, N]
    assert set(deeper.sum(axis=1)) == {8, 9} and deeper.sum() / deeper.size == pytest.approx(share, abs=0.005)
    assert np.abs(deeper.mean(axis=0) - share).max() < 4 * math.sqrt(share * (1 - share) / 300)
    found = [random.exact_quality(np.where(chosen, 6, 2)) for chosen in deeper]
    row = mixtures.row(Mixture((2, 6), share))
    for column in ("pq", "pq_things", "pq_stuff"):
        assert row["exact"][column] == pytest.approx(100 * np.mean([q[column] for q in found]), abs=1e-10)
    assert row["spread"] == pytest.approx(100 * np.std([q["pq"] for q in found]), abs=1e-10) and row["spread"] > 0


def test_a_resample_is_a_dataset_of_the_images_drawn(random):
    rng = np.random.default_rng(3)
    choice = rng.choice(RANDOM_EXITS, len(random))
    mixtures = Mixtures(random, resamples=40)
    cost, quality = mixtures._resampled(choice)
    for counts, gflops, points in zip(mixtures._counts, cost, quality):
        again = np.repeat(np.arange(len(random)), counts)
        resample = random.subset(again)
        assert counts.sum() == len(random)
        assert gflops == pytest.approx(resample.mean_gflops(choice[again])["total"])
        assert points == pytest.approx(100 * resample.exact_quality(choice[again])["pq"], abs=1e-10)


@pytest.mark.parametrize("name", ["PQ", "mIoU"])
def test_many_totals_at_once_are_those_of_one_after_the_other(random, name, monkeypatch):
    """Some of them hold no category, no thing, or no stuff."""
    monkeypatch.setitem(random.provenance, "measure", name)
    counts = np.random.default_rng(0).integers(0, 2, (40, len(random))).astype(np.uint8)
    counts[np.arange(23), :], counts[np.arange(23), np.arange(23)] = 0, 1  # one image each
    counts[23] = 0
    parts = [(np.full(len(random), 3), counts)]
    at_once = CountedQuality(random)(parts)
    monkeypatch.delattr(quality_named(name), "exact_each")
    alone = CountedQuality(random)(parts)
    assert list(at_once) == list(alone) == list(quality_named(name).columns)
    for column, values in alone.items():
        np.testing.assert_allclose(at_once[column], values, atol=1e-12)
        assert 1 <= np.isnan(values).sum() < 20


def test_parts_are_counted_together(random):
    number = len(random)
    counts = np.ones((1, number), np.uint8)
    half = counts * (np.arange(number) < 9)
    parts = [(np.full(number, 2), half), (np.full(number, 6), counts - half)]
    mixed = random.exact_quality(np.where(np.arange(number) < 9, 2, 6))
    found = CountedQuality(random)(parts)
    assert {column: values.item() for column, values in found.items()} == pytest.approx(mixed, abs=1e-12)


def test_the_cheapest_mixture_that_is_good_enough(val):
    mixtures = Mixtures(val)
    mixture = mixtures.cheapest(mixtures.scores[-1] - 1.0)
    row = mixtures.row(mixture)
    assert mixture.exits == (4, 6) and mixtures.scores[-1] - 1.0 <= row["score"] < mixtures.scores[-1] - 0.98
    assert mixtures.cheapest(0.0) == Mixture((2, 2), 0.0) and mixtures.cheapest(100.0) is None
    assert mixtures.cheapest(mixtures.scores[-1]).is_fixed


def test_exit_targets_gain_and_a_choice_at_random_does_not(val, means):
    for dataset in (val, means):
        mixtures = Mixtures(dataset)
        oracle = mixtures.gain(exit_targets(dataset.quality, EXITS, 0.01, 6).numpy())
        assert oracle.is_proven and oracle.p < 0.01 and oracle.low < oracle.gain < oracle.high
        alike = mixtures.gain(np.random.default_rng(5).choice([2, 4], len(dataset)))
        assert not alike.is_proven and alike.low < 0 < alike.high and alike.p > 0.05
        worst = mixtures.gain(np.where(dataset.quality[:, 0] < np.median(dataset.quality[:, 0]), 2, 6))
        assert worst.high < 0 and worst.p == 1.0


def test_the_same_seed_gives_the_same_numbers(val):
    choice = exit_targets(val.quality, EXITS, 0.01, 6).numpy()
    first, again, other = (Mixtures(val, seed=seed).gain(choice) for seed in (0, 0, 1))
    assert first == again != other and 0 <= Mixtures(val, seed=-1).gain(choice).p <= 1
    assert (other.gain, other.low, other.high) == pytest.approx((first.gain, first.low, first.high), abs=0.1)


def test_a_gain_in_a_resample_is_that_of_brute_force(random):
    """The line and its bend stand for draws in each resample."""
    mixtures = Mixtures(random, resamples=30, draws=400)
    choice = np.random.default_rng(0).choice([2, 6], len(random))
    assert len(mixtures.exits) > 1
    gain = mixtures.gain(choice)
    gains = []
    for counts in mixtures._counts:
        again = np.repeat(np.arange(len(random)), counts)
        resample, chosen = random.subset(again), choice[again]
        inner = Mixtures(resample, draws=100)
        cost = resample.mean_gflops(chosen)["total"]
        costs = [resample.mean_gflops(np.full(len(again), k))["total"] for k in mixtures.exits]
        i = min(int(np.searchsorted(costs, cost)), len(costs) - 1)
        share = min(1.0, (cost - costs[i - 1]) / (costs[i] - costs[i - 1]))
        drawn = inner.score(Mixture((mixtures.exits[i - 1], mixtures.exits[i]), share))
        gains.append(100 * resample.exact_quality(chosen)["pq"] - drawn)
    low, high = np.quantile(gains, [0.025, 0.975])
    assert (gain.low, gain.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_intervals_hold_the_truth_and_p_is_uniform_without_a_gain():
    """Of 200 datasets of 80 images, drawn from what is known."""
    rng = np.random.default_rng(0)
    for effect in (0.0, 0.03):
        truth, held, p = 100 * effect * math.sqrt(2 / math.pi), [], []
        for seed in range(200):
            dataset, choice = simulated(rng, 80, effect)
            found = Mixtures(dataset, seed=seed, resamples=200).gain(choice)
            held.append(found.low <= truth <= found.high)
            p.append(found.p)
        assert 0.90 <= np.mean(held) <= 0.99
        if effect == 0:
            assert np.abs(np.quantile(p, [0.1, 0.25, 0.5, 0.75, 0.9]) - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.1
        else:
            assert np.mean(np.array(p) < 0.05) > 0.5
