"""What any gate could win, on data whose answers are known."""

import math

import numpy as np
import pytest
from derived_by_depth import make_derived

from eco_m2f.gates import potential
from eco_m2f.gates.frontier import GateFitter

EXITS = (2, 4, 6)


def told_by_features(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 5] and utilities [n, 3]: the first feature tells all differences of utility."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 5))
    level = 50 + rng.normal(size=n)
    return features, np.stack([level - features[:, 0], level, level + features[:, 0]], axis=1)


def noise(n: int = 600, seed: int = 0) -> np.ndarray:
    return 50 + np.random.default_rng(seed).normal(size=(n, 3))


def test_features_that_tell_all_give_all_that_exit_targets_gain():
    features, utilities = told_by_features()
    found = potential.predictable(features, utilities, EXITS)
    assert found.r2 == pytest.approx({2: 1.0, 4: 1.0}, abs=1e-3)
    assert found.gain.value == pytest.approx(found.oracle.value, rel=0.01)
    assert 0 < found.gain.low < found.gain.value < found.gain.high
    assert found.oracle.value == pytest.approx(potential.oracle_gain(utilities).value, rel=0.1)
    best = abs(features[:, 0].mean())  # what the best fixed exit gains over exit 4
    assert potential.oracle_gain(utilities).value == pytest.approx(np.abs(features[:, 0]).mean() - best)


def test_of_noise_nothing_is_predicted_and_nothing_survives():
    features = np.random.default_rng(9).normal(size=(600, 40))
    found = potential.predictable(features, noise(), EXITS)
    assert all(-0.05 < value <= 0.01 for value in found.r2.values())
    assert found.oracle.low > 0.6 and abs(found.gain.value) < 0.1 and found.gain.low < 0
    survived = potential.survival(noise(), noise(seed=1))
    assert survived.gain.low > 0.6 and abs(survived.survives.value) < 0.1 and abs(survived.share) < 0.1


def test_all_survives_on_an_equal_view_and_half_where_half_is_noise():
    _, utilities = told_by_features()
    same = potential.survival(utilities, utilities)
    assert same.gain == same.survives and same.share == 1
    assert same.gain.value == pytest.approx(potential.oracle_gain(utilities).value)
    noisy = potential.survival(utilities + noise(400), utilities + noise(400, seed=1))
    assert noisy.survives.value < same.gain.value < noisy.gain.value and 0.2 < noisy.share < 0.8
    swapped = potential.survival(utilities + noise(400, seed=1), utilities + noise(400))
    assert swapped == noisy


def test_without_a_gain_there_is_no_share():
    flat = np.full((5, 3), 50.0)
    assert math.isnan(potential.survival(flat, flat).share) and potential.oracle_gain(flat).value == 0
    assert math.isnan(potential.predictable(np.ones((5, 2)), flat, EXITS).r2[2])


def solved(x: np.ndarray, y: np.ndarray, strength: float, new: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept that has no penalty, from the normal equations."""
    with_one = np.column_stack([np.ones(len(x)), x])
    penalty = np.diag([0.0, *[strength] * x.shape[1]])
    weight = np.linalg.solve(with_one.T @ with_one + penalty, with_one.T @ y)
    return np.column_stack([np.ones(len(new)), new]) @ weight


@pytest.mark.parametrize("shape", [(12, 4), (8, 20)], ids=["tall", "wide"])
def test_the_penalty_is_the_best_of_leaving_out_each_image(shape):
    rng = np.random.default_rng(3)
    x, new = rng.normal(size=shape), rng.normal(size=(5, shape[1]))
    y = x[:, 0] + 0.5 * rng.normal(size=shape[0])
    x, new = (x - x.mean(axis=0)) / x.std(axis=0), (new - x.mean(axis=0)) / x.std(axis=0)
    strengths = [shape[0] * min(p, 1e9) for p in potential._PENALTIES]

    def left_out(strength: float) -> float:
        others = [np.delete(np.arange(shape[0]), i) for i in range(shape[0])]
        return sum(float((y[i] - solved(x[o], y[o], strength, x[i : i + 1])[0]) ** 2) for i, o in enumerate(others))

    best = min(strengths, key=left_out)
    predicted, mean = potential._ridge(x, y[:, None], new)
    assert best < strengths[-1] and mean == pytest.approx(y.mean())
    assert predicted[:, 0] == pytest.approx(solved(x, y, best, new))


def test_few_images_and_a_constant_feature():
    features, utilities = told_by_features(4)
    features[:, 1] = 7.0
    found = potential.predictable(features, utilities, EXITS)
    assert all(math.isfinite(value) for value in found.r2.values())
    with pytest.raises(ValueError, match="needs 3 images or more, not 2: derive more"):
        potential.predictable(features[:2], utilities[:2], EXITS)


def test_the_same_seed_gives_the_same_numbers():
    features, utilities = told_by_features(50)
    noisy = utilities + noise(50)
    assert potential.predictable(features, noisy, EXITS, 3) == potential.predictable(features, noisy, EXITS, 3)
    assert potential.predictable(features, noisy, EXITS, 3) != potential.predictable(features, noisy, EXITS, 4)


def test_a_gate_gains_a_part_of_what_exit_targets_gain(tmp_path):
    train, val = (make_derived(tmp_path / str(seed), 200, seed) for seed in (0, 1))
    gate = potential.gate_gain(train, val, 0.01, 6)
    oracle = potential.oracle_gain(potential.utilities(val, 0.01, 6))
    assert 0 < gate.low < gate.value <= oracle.value
    assert potential.utilities(val, 0.01, 4).shape == (200, 2)
    assert potential.utilities(val, 0.01, 4)[0, 1] == pytest.approx(100 * val.quality[0, 1] - 4)


def test_views_that_do_not_belong_together_are_refused(tmp_path):
    def made(name: str, seed: int = 0, n: int = 6, **changes):
        return make_derived(tmp_path / name, n, seed, **changes)

    plain, mirrored = made("plain"), made("mirrored", view="mirrored")
    potential.check_views(plain, mirrored)
    with pytest.raises(ValueError, match="both derived datasets are of the plain view: .* --view mirrored"):
        potential.check_views(plain, plain)
    with pytest.raises(ValueError, match="dataset is toy_0 in the first view, toy_1 in the second"):
        potential.check_views(plain, made("other", seed=1, view="mirrored"))
    with pytest.raises(ValueError, match="parent_sha256 is aaa.* in the second: derive both alike"):
        potential.check_views(plain, made("parent", view="mirrored", parent_sha256="b" * 64))
    with pytest.raises(ValueError, match="annotation_sha256 is None in the first view, ccc"):
        potential.check_views(plain, made("annotation", view="mirrored", annotation_sha256="c" * 64))
    with pytest.raises(ValueError, match="quality is PQ in the first view, mIoU in the second"):
        potential.check_views(plain, made("miou", view="mirrored", measure="mIoU"))
    with pytest.raises(ValueError, match="hold different images"):
        potential.check_views(plain, made("more", n=7, view="mirrored"))


def test_gates_are_not_fitted_across_views(tmp_path):
    plain, mirrored = (make_derived(tmp_path / v, 6, 0, **c) for v, c in (("p", {}), ("m", {"view": "mirrored"})))
    for pair, first, second in (((plain, mirrored), "plain", "mirrored"), ((mirrored, plain), "mirrored", "plain")):
        with pytest.raises(ValueError, match=f"the view is {first} for training, {second} .* derive both with one --v"):
            GateFitter(*pair)
    GateFitter(mirrored, mirrored)
