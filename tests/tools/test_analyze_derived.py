"""tools/analyze_derived.py end to end, on small derived datasets."""

import csv

import pytest
from derived_by_depth import make_derived
from tiny import here


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder}. The mirrored view has the qualities of the plain one."""
    base = tmp_path_factory.mktemp("derived")
    made = {"train": (150, 0, {}), "val": (60, 1, {}), "mirrored": (60, 1, {"view": "mirrored"})}
    for name, (n, seed, changes) in made.items():
        make_derived(base / name, n, seed, **changes)
    return {name: base / name for name in made}


def analyze(folders, *more, val: str = "val"):
    return here("analyze_derived", "--train", folders["train"], "--val", folders[val], "--beta", "0.01", *more)


def test_it_prints_the_gains_and_a_sentence_for_each(folders, tmp_path):
    path = tmp_path / "potential.csv"
    done = analyze(folders, "--second", folders["mirrored"], "--output", path)
    assert done.returncode == 0, done.stderr
    with open(path) as file:
        lines = list(csv.DictReader(file))
    gains = {line["name"]: line for line in lines if not line["exit"]}
    assert list(gains) == ["targets", "both views", "survives", "predictable", "gate"]
    assert [gains[name]["images"] for name in gains] == ["60", "60", "60", "150", "60"]
    value = {name: float(line["value"]) for name, line in gains.items()}
    assert value["targets"] == value["both views"] == value["survives"] >= value["gate"] > 0
    assert all(float(g["low"]) <= float(g["value"]) <= float(g["high"]) for g in gains.values())
    assert [line["exit"] for line in lines if line["name"] == "r2"] == ["2", "4"]
    for name, number in value.items():
        assert any(line.startswith(name) and f"{number:+.2f}" in line for line in done.stdout.splitlines())
    assert "beta 0.01, K 6, PQ; the best fixed exit on --val is" in done.stdout
    assert "0.00 vanish when they are chosen on the other view (mirrored)" in done.stdout
    assert f"The features predict {value['predictable']:.2f} of the" in done.stdout
    assert f"The gate gains {value['gate']:.2f} points on --val." in done.stdout


def test_what_does_not_survive_is_called_chance(folders, tmp_path):
    """The second view has the qualities of other images."""
    make_derived(tmp_path / "other", 60, 2, view="mirrored", dataset="toy_1")
    done = analyze(folders, "--second", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert "vanish when they are chosen on the other view (mirrored): they are chance. It is not proven" in done.stdout


def test_one_view_and_another_depth(folders):
    done = analyze(folders, "--max-exit", "4")
    assert done.returncode == 0, done.stderr
    assert "K 4" in done.stdout and "survives" not in done.stdout and "exit 2" in done.stdout
    assert "exit 4:" not in done.stdout


def test_datasets_that_do_not_belong_together_are_refused(folders):
    done = analyze(folders, "--second", folders["val"])
    assert done.returncode == 1 and "both derived datasets are of the plain view" in done.stderr
    done = analyze(folders, val="mirrored")
    assert done.returncode == 1 and "the view is plain for training, mirrored for validation" in done.stderr
    done = analyze(folders, "--max-exit", "5")
    assert done.returncode == 1 and "not 5" in done.stderr
